"""Rounds in turn, by a clock of our own: when they end, what they say, and that a noisy machine hits both sides."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from coldpress.config.metrics import Timing
from coldpress.evaluate.timing import alternate, blocks, machine_state


class Clock:
    """Time passes only where work is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


class Side:
    """Work that takes what a function of (when, piece) says; notes who was asked what."""

    def __init__(self, name: str, clock: Clock, takes: Any, log: list[tuple[str, int]]) -> None:
        self.name, self.clock, self.takes, self.log = name, clock, takes, log

    def __call__(self, piece: int) -> float:
        seconds = float(self.takes(self.clock.now, piece))
        self.clock.now += seconds
        self.log.append((self.name, piece))
        return seconds


def run(timing: Timing, pieces: int = 1, **sides: Any) -> tuple[Any, list[tuple[str, int]], Clock]:
    clock, log = Clock(), []
    made: dict[str, Any] = {name: Side(name, clock, takes, log) for name, takes in sides.items()}
    found = alternate(made, lambda seconds: seconds, timing, pieces=pieces, clock=clock, sleep=clock.sleep)
    return found, log, clock


def test_in_turn_over_all_pieces() -> None:
    timing = Timing(warmup_num=1, repeat_test_num=4, confidence=0.5)
    found, log, _ = run(timing, pieces=12, a=lambda *_: 1, b=lambda *_: 2)
    assert log[:4] == [("a", 0), ("b", 0), ("a", 0), ("b", 0)], "a warm-up of each, then A B"
    assert log[4:8] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert {piece for _, piece in log} == set(range(12)), "never only the first batch"
    assert found.rounds == 12
    assert found.samples == {"a": [1.0] * 12, "b": [2.0] * 12}
    assert found.narrow
    assert found.details("a")["in_turn_with"] == ["b"]
    alone, _, _ = run(timing, a=lambda *_: 1)
    assert "in_turn_with" not in alone.details("a")


def test_repeated_until_the_interval_is_narrow() -> None:
    rng = np.random.default_rng(0)
    noise = lambda *_: rng.normal(1, 0.2)  # noqa: E731 - a short fake
    wide, _, _ = run(Timing(warmup_num=0, repeat_test_num=10, confidence=0.1, max_seconds=1e9), a=noise)
    fine, _, _ = run(Timing(warmup_num=0, repeat_test_num=10, confidence=0.02, max_seconds=1e9), a=noise)
    # 1.96 * 0.2 / sqrt(n) is 0.02 at n = 384.
    assert 10 <= wide.rounds < 60
    assert 200 < fine.rounds < 700
    assert fine.interval["a"] <= 0.02 < wide.interval["a"] <= 0.1


def test_neighbours_that_depend_on_each_other_need_more_rounds() -> None:
    """A machine that is slow for a while: single rounds would look surer than they are."""
    timing = Timing(warmup_num=0, repeat_test_num=10, confidence=0.05, max_seconds=1e9)

    def rounds(seed: int, lasting: float) -> int:
        levels = np.random.default_rng(seed).normal(1, 0.2, 4000)
        return int(run(timing, a=lambda now, _: levels[int(now * lasting) % 4000])[0].rounds)

    # As many levels are needed, and one lasts five rounds.
    drifting = sum(rounds(seed, 0.2) for seed in range(20))
    independent = sum(rounds(seed, 7919) for seed in range(20))
    assert drifting > 2 * independent


def test_a_drifting_machine_hits_both_sides() -> None:
    factor = lambda now: 1 + now / 40  # noqa: E731
    found, _, _ = run(
        Timing(warmup_num=0, repeat_test_num=40, confidence=0.9),
        a=lambda now, _: factor(now), b=lambda now, _: 1.5 * factor(now),
    )  # fmt: skip
    ratio = sum(found.samples["b"]) / sum(found.samples["a"])
    assert ratio == pytest.approx(1.5, rel=0.05)
    assert found.samples["a"][-1] > 2 * found.samples["a"][0]


def test_the_time_is_up() -> None:
    rng = np.random.default_rng(2)
    found, _, clock = run(
        Timing(warmup_num=0, repeat_test_num=500, confidence=0.001, max_seconds=20), a=lambda *_: rng.uniform(0.5, 1.5)
    )
    assert 20 <= clock.now < 22
    assert not found.narrow
    assert found.details("a")["confidence_reached"] is False
    slow, _, _ = run(Timing(warmup_num=0, repeat_test_num=2, max_seconds=1), a=lambda *_: 50)
    assert slow.rounds == 2
    assert math.isinf(slow.interval["a"])
    assert slow.details("a")["confidence_95"] is None


def test_sleep_between_rounds() -> None:
    _, _, clock = run(Timing(warmup_num=2, repeat_test_num=12, confidence=0.5, sleep_num=0.25), a=lambda *_: 1)
    assert clock.slept == [0.25] * 11


def test_blocks_and_machine() -> None:
    assert blocks(12) == [0] * 5 + [1] * 5 + [2] * 2
    state = machine_state()
    assert state["load"] >= 0
    assert state["threads"] >= 1
