"""What is concluded from trials: pure functions, figures made up."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldpress.config.metrics import Evaluator
from coldpress.scores import GoalOutcome, Score
from coldpress.search.objectives import Objective, dearness, loss, losses, objectives_of, violation
from coldpress.search.trials import Trial, choose, dominates, front, nearest, no_worse, ranked, total_violation

SPEED, QUALITY = Objective("speed", "speed", 1), Objective("quality", "quality", 2)


def score(name: str, value: float, *, higher: bool = True, error: float | None = 0.0, lacks: float = 0.0) -> Score:
    goal = None
    if lacks:
        goal = GoalOutcome("threshold", value + lacks, value + lacks, False, -lacks, True)
    return Score("build", name, name, value, "", higher, 1, error, goal=goal)


def trial(number: int, *scores: Score, state: Any = "feasible", **more: Any) -> Trial:
    lacks = total_violation(scores)
    return Trial(number, {}, {}, state, scores=scores, violation=lacks, key=f"key-{number}", **more)


def test_the_first_objective_decides() -> None:
    slow, fast = trial(1, score("speed", 10), score("quality", 9)), trial(2, score("speed", 11), score("quality", 1))
    choice = choose([slow, fast], [SPEED, QUALITY])
    assert choice is not None
    assert choice.trial is fast
    assert "the best in speed, 11" in choice.why
    assert choose([slow, fast], [QUALITY, SPEED]).trial is slow  # type: ignore[union-attr]


def test_within_noise_the_next_objective_decides_and_then_the_figure() -> None:
    rows = [(10.0, 5.0), (10.5, 1.0), (7.0, 9.0), (10.4, 5.0)]
    trials = [
        trial(number, score("speed", speed, error=0.3), score("quality", quality))
        for number, (speed, quality) in enumerate(rows, 1)
    ]
    choice = choose(trials, [SPEED, QUALITY])
    assert choice is not None
    # 10.5, 10.4 and 10.0 are level (two standard errors of the difference are 0.85); of these two have quality 5.
    assert choice.trial.number == 4
    assert "3 are, within two standard errors" in choice.why


def test_a_figure_of_no_known_error_counts_as_it_stands() -> None:
    trials = [trial(n, score("speed", 10 + n, error=None), score("quality", -n)) for n in (1, 2)]
    choice = choose(trials, [SPEED, QUALITY])
    assert choice is not None
    assert choice.trial is trials[1]
    assert choice.why == "of 2 that meet every goal, the best in speed, 12 (its error is not known)"


def test_a_lower_is_better_number_is_turned_round() -> None:
    worse, better = trial(1, score("speed", 5, higher=False)), trial(2, score("speed", 3, higher=False))
    assert choose([worse, better], [SPEED]).trial is better  # type: ignore[union-attr]
    assert loss(score("x", 3, higher=False)) == 3
    assert loss(score("x", 3)) == -3


def test_what_misses_a_goal_or_failed_is_never_chosen() -> None:
    trials = [
        trial(1, score("speed", 100, lacks=1), state="infeasible"),
        trial(2, score("speed", 100), state="failed"),
        Trial(3, {}, {}, "pruned", violation=0.5),
        trial(4, score("speed", 1)),
    ]
    assert choose(trials, [SPEED]).trial.number == 4  # type: ignore[union-attr]
    assert choose(trials[:3], [SPEED]) is None


def test_a_trial_without_the_objective_does_not_win() -> None:
    trials = [trial(1), trial(2, score("speed", 1))]
    assert choose(trials, [SPEED]).trial.number == 2  # type: ignore[union-attr]


def test_nearest_are_those_that_lack_the_least() -> None:
    trials = [
        trial(1, score("q", 0.5, lacks=0.5), state="infeasible"),
        trial(2, score("q", 0.9, lacks=0.1), state="infeasible"),
        Trial(3, {}, {}, "pruned", violation=0.05, judged=False),
        Trial(4, {}, {}, "failed", why="a bug"),
        Trial(5, {}, {}, "pruned", why="refused"),
    ]
    assert [one.number for one in nearest(trials)] == [2, 1, 3], "what a plan knows is the least that it may lack"
    assert trials[1].told == pytest.approx(0.1)
    assert trials[3].told > trials[0].told > 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_the_front_is_what_nothing_dominates(pairs: list[tuple[int, int]]) -> None:
    trials = [trial(n, score("speed", a), score("quality", b)) for n, (a, b) in enumerate(pairs)]
    found = {one.number for one in front(trials, [SPEED, QUALITY])}
    for mine, (a, b) in enumerate(pairs):
        beaten = any(c >= a and d >= b and (c, d) != (a, b) for c, d in pairs)
        assert (mine in found) is not beaten


pairs_of_figures = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), min_size=1, max_size=12)


@given(pairs_of_figures)
@settings(max_examples=200, deadline=None)
def test_what_is_put_out_of_the_race_changes_neither_winner_nor_front(rows: list[tuple[int, int, bool]]) -> None:
    """`rows`: two figures and whether the proof would hold, in the order of trying."""
    objectives = [SPEED, QUALITY]
    everything: list[Trial] = []
    raced: list[Trial] = []
    for number, (a, b, holds) in enumerate(rows, 1):
        scores = score("speed", a), score("quality", b)
        proved = trial(number, *scores, state="feasible" if holds else "failed")
        everything.append(proved)
        rival = no_worse(scores, raced, objectives)
        raced.append(proved if rival is None else trial(number, *scores, state="unproved", proved=False))

    def figures(trials: list[Trial]) -> set[tuple[float | None, ...]]:
        return {losses(objectives, one.scores) for one in trials}

    assert figures(front(raced, objectives)) == figures(front(everything, objectives))
    first, second = choose(raced, objectives), choose(everything, objectives)
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert first.trial.state == "feasible"
        assert first.trial.number == second.trial.number


def test_what_is_not_known_exactly_puts_nobody_out_of_the_race() -> None:
    rival = trial(1, score("speed", 9), score("quality", 9))
    better = score("speed", 1)
    assert no_worse([better, score("quality", 1)], [rival], [SPEED, QUALITY]) is rival
    assert no_worse([better], [rival], [SPEED]) is rival
    assert no_worse([better], [rival], [SPEED, QUALITY]) is None, "not measured yet"
    assert no_worse([better, score("quality", 1, error=0.1)], [rival], [SPEED, QUALITY]) is None
    for error in (0.1, None):
        assert no_worse([better], [trial(1, score("speed", 9, error=error))], [SPEED]) is None
    for state in ("infeasible", "unproved", "failed"):
        assert no_worse([better], [trial(1, score("speed", 9), state=state)], [SPEED]) is None


def test_what_is_not_proved_stands_behind_what_is() -> None:
    trials = [
        trial(1, score("speed", 1)),
        trial(2, score("speed", 2, lacks=1), state="infeasible"),
        trial(3, score("speed", 8), state="unproved"),
        trial(4, score("speed", 9), state="unproved"),
        trial(5, score("speed", 9), state="failed"),
    ]
    assert [one.number for one in ranked(trials, [SPEED])] == [1, 4, 3, 2]
    assert [one.told for one in trials[2:4]] == [0, 0]
    choice = choose(trials, [SPEED])
    assert choice is not None
    assert (choice.trial.number, choice.why) == (1, "it meets every goal; 2 more are no better and not proved")


def test_dominance_is_strict_and_partial() -> None:
    assert dominates((1, 1), (1, 2))
    assert not dominates((1, 1), (1, 1))
    assert not dominates((1, 3), (2, 2))
    for a, b in itertools.product([(1, 2), (2, 1), (1, 1)], repeat=2):
        assert not (dominates(a, b) and dominates(b, a))


def test_losses_and_violations() -> None:
    scores = [score("speed", 4), score("quality", 0.5, lacks=0.25)]
    assert losses([SPEED, QUALITY, Objective("none", "none", 3)], scores) == (-4, -0.5, None)
    outcome = scores[1].goal
    assert outcome is not None
    assert violation(outcome) == pytest.approx(0.25 / 0.75)
    assert violation(GoalOutcome("threshold", 0, 0, False, -3.0, True)) == 3.0


def evaluator(*metrics: dict[str, Any]) -> Evaluator:
    return Evaluator.model_validate({"metrics": list(metrics)})


def test_objectives_are_numbers_with_a_priority_or_those_without_a_goal() -> None:
    kept = {"goal": {"type": "threshold", "value": 9}}
    size: dict[str, Any] = {"name": "size", "type": "size_on_disk", "sub_types": [{"name": "bytes", **kept}]}
    speed: dict[str, Any] = {"name": "speed", "type": "latency", "sub_types": [{"name": "p50"}, {"name": "p99"}]}
    assert [str(one) for one in objectives_of([evaluator(size, speed)])] == ["speed p50", "speed p99"]
    assert [str(one) for one in objectives_of([evaluator(size)])] == ["size bytes"]
    ranked = {**speed, "sub_types": [{"name": "p50", "priority": 2}, {"name": "p99", "priority": 1}]}
    assert [str(one) for one in objectives_of([evaluator(size, ranked)])] == ["speed p99", "speed p50"]


def test_cheap_metrics_come_first() -> None:
    data = {"data_config": "d"}
    found = evaluator(
        {"name": "t", "type": "generation"}, {"name": "m", "type": "memory"}, {"name": "a", "type": "accuracy", **data},
        {"name": "p", "type": "perplexity", **data}, {"name": "s", "type": "size_on_disk"},
    )  # fmt: skip
    assert [one.name for one in sorted(found.measured, key=dearness)] == ["s", "p", "a", "m", "t"]
