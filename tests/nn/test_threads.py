"""How many threads torch takes: by the work, unless the user says, and one beside other programs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from coldpress.data.packing import TokenSequence
from coldpress.events import Event
from coldpress.nn.threads import CROWDED, HOLD_SECONDS, LOOK_SECONDS, Threads, threads_for


def model(width: int) -> torch.nn.Module:
    made = torch.nn.Linear(2, 2)
    made.config = SimpleNamespace(hidden_size=width)
    return made


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield None
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("width", "rows", "tokens", "expected"),
    [(64, 4, 4096, 1), (192, 4, 4096, 2), (192, 8, 4096, 4), (1024, 1, 4096, 3), (1024, 8, 32, 2)],
)
def test_threads_follow_the_work(width: int, rows: int, tokens: int, expected: int) -> None:
    sequences = [TokenSequence([1] * length, [1] * length) for length in (40, 56)]
    events: list[Event] = []
    with threads_for(model(width), sequences, rows, tokens, "train", events.append):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 4
    assert bool(events) == (expected < 4), "it is said"


def test_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with threads_for(model(8), [TokenSequence([1, 2], [1, 2])], 1, 4096, "train", lambda event: None):
        assert torch.get_num_threads() == 4


def test_a_training_gets_all_threads_though_what_was_before_it_had_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof that a worker made beside another program leaves torch with one thread; that is no limit for the next."""
    now = [0.0]
    outer = Threads(4, clock=lambda: now[0], waited=lambda: now[0])
    monkeypatch.setattr("coldpress.nn.threads._current", [outer])
    now[0] = 1.0
    outer.tick()
    assert torch.get_num_threads() == 1
    with threads_for(model(1024), [TokenSequence([1] * 64, [1] * 64)], 8, 4096, "train", lambda event: None):
        assert torch.get_num_threads() == 4
    assert torch.get_num_threads() == 4


class Machine:
    """A clock, and how long threads have waited for a processor."""

    def __init__(self) -> None:
        self.now = self.waited = 0.0

    def run(self, threads: Threads, seconds: float, *, busy: bool) -> list[int]:
        """Steps of 50 ms; the threads that each was made with."""
        used = []
        for _ in range(round(seconds / 0.05)):
            threads.tick()
            used.append(torch.get_num_threads())
            self.now += 0.05
            if busy and used[-1] > 1:
                self.waited += 0.05 * 2 * CROWDED
        return used


def test_one_thread_beside_another_program() -> None:
    machine, said = Machine(), []
    threads = Threads(4, say=said.append, clock=lambda: machine.now, waited=lambda: machine.waited)
    assert set(machine.run(threads, 10, busy=False)) == {4}
    used = machine.run(threads, 300, busy=True)
    # It looks again after 1, 2, 4, ... 60 seconds, each time for a quarter of one.
    tries = sum(before == 1 and after == 4 for before, after in pairwise(used))
    assert 8 <= tries <= 12
    assert used.count(4) <= (tries + 1) * (LOOK_SECONDS / 0.05 + 1)
    assert len(said) == 1
    used = machine.run(threads, HOLD_SECONDS[1] + 10, busy=False)
    assert set(used[round(HOLD_SECONDS[1] / 0.05) + 1 :]) == {4}, "and all of them when it has gone"


def test_a_busy_machine_is_noticed() -> None:
    """On the real clock, by what the system says of waiting: more threads than processors."""
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this system does not tell how long threads wait")
    threads = Threads(2)
    before = threads._waited()
    with _busy(2 * (os.cpu_count() or 1)):
        deadline = time.monotonic() + 10
        while threads._waited() - before < 0.2 and time.monotonic() < deadline:
            sum(range(10_000))
    assert threads._waited() - before >= 0.2


@contextmanager
def _busy(processes: int) -> Iterator[None]:
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()
