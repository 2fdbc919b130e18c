"""Timing two models side by side: A B A B ..., so that a noisy machine hits both, until the figures are narrow enough.

    warm-up      each side a few times, not counted
    round        one piece of work by every side, one after the other
    enough       every side's mean is known to +- `confidence` (half its 95 % interval, as a share of it), every piece
                 of work was done, and there were as many rounds as asked for; or the time is up, and the record says so

Times of neighbouring rounds depend on each other (another program runs, the clock slows down), so errors are those of
blocks of rounds. The state of the machine is recorded with the figures: a load beside them explains much.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from coldpress.config.metrics import Timing
from coldpress.evaluate.statistics import mean_error
from coldpress.hardware import detect

__all__ = ["BLOCK", "Rounds", "alternate", "blocks", "machine_state"]

BLOCK = 5
"""Rounds whose times count as one witness."""
_STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Half a 95 % interval in standard errors, for 1 to 10 degrees of freedom: two blocks say little of their spread."""

T = TypeVar("T")


@dataclass(frozen=True)
class Rounds:
    """What came of timing several sides in turn."""

    samples: Mapping[str, Sequence[Any]]
    """Of each side, one a round."""
    rounds: int
    warmup: int
    narrow: bool
    """Whether the interval asked for was reached."""
    interval: Mapping[str, float]
    """Half the 95 % interval of each side's mean, as a share of it."""
    seconds: float
    machine: Mapping[str, Any]

    def details(self, side: str) -> dict[str, Any]:
        """What belongs beside a figure of a side."""
        others = [name for name in self.samples if name != side]
        return {
            "rounds": self.rounds,
            "warmup": self.warmup,
            "confidence_95": round(self.interval[side], 4) if math.isfinite(self.interval[side]) else None,
            "confidence_reached": self.narrow,
            **({"in_turn_with": others} if others else {}),
            **self.machine,
        }


def alternate(
    sides: Mapping[str, Callable[[int], T]],
    seconds_of: Callable[[T], float],
    timing: Timing,
    *,
    pieces: int,
    on_round: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Rounds:
    """Let every side do its work in turn; `sides` map a name to a function of the piece of work (0 to `pieces` - 1)."""
    before = machine_state()
    for number in range(timing.warmup_num):
        for work in sides.values():
            work(number % pieces)
    samples: dict[str, list[T]] = {name: [] for name in sides}
    started = clock()
    rounds, narrow = 0, False
    while True:
        for name, work in sides.items():
            samples[name].append(work(rounds % pieces))
        rounds += 1
        if on_round is not None:
            on_round(clock() - started)
        widths = {name: _width([seconds_of(one) for one in each]) for name, each in samples.items()}
        narrow = rounds >= max(timing.repeat_test_num, pieces) and max(widths.values()) <= timing.confidence
        if narrow or (rounds >= 2 and clock() - started >= timing.max_seconds):
            break
        if timing.sleep_num:
            sleep(timing.sleep_num)
    after = machine_state()
    machine = {**after, "load_before": before["load"]}
    return Rounds(samples, rounds, timing.warmup_num, narrow, widths, clock() - started, machine)


def blocks(count: int) -> list[int]:
    """Which block each round belongs to."""
    return [number // BLOCK for number in range(count)]


def _width(seconds: Sequence[float]) -> float:
    if len(seconds) < 2 * BLOCK:
        return math.inf
    mean, error = mean_error(seconds, blocks(len(seconds)))
    assert error is not None  # of two blocks or more
    freedom = len(seconds) // BLOCK - 1
    factor = _STUDENT_95[freedom - 1] if freedom <= len(_STUDENT_95) else 1.96 + 2.5 / freedom
    return factor * math.sqrt((freedom + 1) / freedom) * error / mean


def machine_state() -> dict[str, Any]:
    """Load and clock of the machine, as far as it tells."""
    import psutil

    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError):  # no such file in a container
        frequency = None
    return {
        "load": round(psutil.getloadavg()[0], 2),
        "threads": detect().threads,
        "cpu_mhz": None if frequency is None or not frequency.current else round(frequency.current),
    }
