"""How many CPU threads torch's kernels are divided among: as many as the work is worth, one beside other programs.

A kernel that is divided waits for its slowest thread. Where each thread has a processor, that is nothing: they wait
awake for the next kernel (`GOMP_SPINCOUNT` in `systems.local`). Beside another program, one of them waits for a
processor as well, all others wait for that one, and a step takes several times as long as with one thread alone. Linux
tells how long threads were ready to run and did not: long loops call `tick`, which looks at that and goes down to one
thread, and tries again later.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from coldpress.data.packing import TokenSequence
from coldpress.events import Message, Sink

__all__ = ["Threads", "threads_for", "tick"]

WORK = 1 << 14
"""Numbers of a layer's input (hidden size times tokens) that one thread is worth."""
CROWDED = 0.25
"""Seconds that threads waited for a processor, to each second that went by."""
LOOK_SECONDS = 0.25
HOLD_SECONDS = 1.0, 60.0
"""How long one thread goes on alone: at first, and at most. Doubled each time that it is still crowded."""
TASKS = Path("/proc/self/task")


class Threads:
    """The number that torch uses, lowered to one while threads wait for a processor."""

    def __init__(
        self,
        most: int,
        *,
        say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        waited: Callable[[], float] | None = None,
    ) -> None:
        """`waited` gives the seconds that this process's threads have waited for a processor so far."""
        self.most = most
        self._say, self._clock, self._waited = say, clock, waited or _waited
        self._hold = HOLD_SECONDS[0]
        self.now = most
        """In use."""
        self._since = self._next = self._before = 0.0
        self.start()

    def tick(self) -> None:
        """To be called often, from the thread that computes."""
        now = self._clock()
        if self.most < 2 or now < self._next:
            return
        if self.now == 1:
            self.start()
            return
        if self._waited() - self._before > CROWDED * (now - self._since):
            self._use(1)
            self._next = now + self._hold
            if self._hold == HOLD_SECONDS[0]:
                self._say("other programs use the processors: one thread while they do")
            self._hold = min(2 * self._hold, HOLD_SECONDS[1])
        else:
            self._hold = max(self._hold / 2, HOLD_SECONDS[0])
            self._look_from(now)

    def start(self) -> None:
        """All of them, whatever was before."""
        self._use(self.most)

    def _use(self, threads: int) -> None:
        self.now = threads
        torch.set_num_threads(threads)
        self._look_from(self._clock())

    def _look_from(self, now: float) -> None:
        self._since, self._next = now, now + LOOK_SECONDS
        self._before = self._waited() if self.most > 1 else 0.0


def _waited() -> float:
    """Seconds, of all threads of this process; 0 where the system does not say."""
    total = 0
    for file in TASKS.glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that has ended meanwhile
            total += int(file.read_text(encoding="ascii").split()[1])
    return total / 1e9


_current: list[Threads] = []


def tick() -> None:
    """Between two pieces of a long computation with torch on the CPU."""
    _innermost().tick()


def _innermost() -> Threads:
    """Made anew where somebody else has told torch how many threads to use since."""
    threads = torch.get_num_threads()
    if not _current or _current[-1].now != threads:
        _current[-1:] = [Threads(threads)]
    return _current[-1]


@contextmanager
def threads_for(
    model: Any, sequences: Sequence[TokenSequence], rows: int, tokens: int, step: str, emit: Sink
) -> Iterator[None]:
    """While the block runs, torch uses as many threads as pay for steps of `rows` rows, `tokens` at most at a time.

    What the user says in OMP_NUM_THREADS is the number where nothing else wants the processors.
    """
    outer = _innermost()
    before = outer.most  # and not what torch uses now, which may be one beside another program
    width = getattr(model.config, "hidden_size", None)
    if next(model.parameters()).device.type != "cpu" or before == 1:
        yield
        return
    threads = before
    if "OMP_NUM_THREADS" not in os.environ and width:
        mean = sum(len(one.ids) for one in sequences) / len(sequences)
        numbers = int(width) * min(mean * rows, tokens)
        threads = max(1, min(before, int(numbers // WORK)))
        if threads < before:
            said = f"a layer's {numbers / 1e3:.0f} thousand numbers are too few for more"
            emit(Message("info", f"{threads} of {before} CPU threads: {said}", step))
    _current.append(Threads(threads, say=lambda text: emit(Message("info", text, step))))
    try:
        yield
    finally:
        _current.pop()
        outer.start()
