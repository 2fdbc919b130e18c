"""Every type of goal in both directions, against the table in `goals` written out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from coldpress.config.metrics import Goal
from coldpress.errors import PlanError
from coldpress.goals import bound, is_relative, judge


@dataclass(frozen=True)
class Measured:
    value: float
    higher_is_better: bool = True
    standard_error: float | None = None


def goal(kind: str, value: float) -> Goal:
    return Goal.model_validate({"type": kind, "value": value})


@pytest.mark.parametrize(
    ("kind", "value", "baseline", "higher", "lower"),
    [
        ("threshold", 7, 40, 7, 7),
        ("min-improvement", 4, 40, 44, 36),
        ("percent-min-improvement", 25, 40, 50, 30),
        ("max-degradation", 4, 40, 36, 44),
        ("percent-max-degradation", 25, 40, 30, 50),
        ("percent-min-improvement", 25, -40, -30, -50),
        ("percent-max-degradation", 25, -40, -50, -30),
    ],
)
def test_bounds(kind: str, value: float, baseline: float, higher: float, lower: float) -> None:
    asked = goal(kind, value)
    assert bound(asked, Measured(baseline), higher_is_better=True) == higher
    assert bound(asked, Measured(baseline), higher_is_better=False) == lower


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("kind", ["threshold", "min-improvement", "percent-max-degradation"])
def test_met_at_the_bound_and_better(kind: str, higher: bool) -> None:
    asked, baseline = goal(kind, 0.1), Measured(0.3, higher)
    edge = bound(asked, baseline, higher_is_better=higher)
    step = 0.01 if higher else -0.01
    for value, met in ((edge, True), (edge + step, True), (edge - step, False)):
        found = judge(asked, Measured(value, higher), baseline)
        assert (found.met, found.bound) == (met, edge)
        assert found.margin == pytest.approx(0 if value == edge else 0.01 if met else -0.01)


def test_the_last_bit_of_the_bound_does_not_decide() -> None:
    found = judge(goal("max-degradation", 0.1), Measured(0.8 - 0.1), Measured(0.8))
    assert found.met
    assert judge(goal("max-degradation", 0.1), Measured(0.7), Measured(0.1 + 0.7)).met, "0.1 + 0.7 - 0.1 is over 0.7"


def test_what_is_not_finite_meets_nothing() -> None:
    assert not judge(goal("threshold", 10), Measured(math.inf, False), None).met
    assert not judge(goal("max-degradation", 1), Measured(math.inf, False), Measured(5, False)).met
    assert not judge(goal("max-degradation", 1), Measured(math.inf, False), Measured(math.inf, False)).met


def test_sure_beyond_two_standard_errors_of_both() -> None:
    asked = goal("max-degradation", 0.1)
    baseline = Measured(0.9, True, 0.03)
    assert not judge(asked, Measured(0.89, True, 0.04), baseline).sure  # margin 0.09, error 0.05
    assert judge(asked, Measured(0.91, True, 0.04), baseline).sure  # margin 0.11
    assert judge(goal("threshold", 0.8), Measured(0.89, True, 0.04), baseline).sure  # the baseline plays no part
    percent = goal("percent-min-improvement", 50)  # the bound moves half as much as the baseline
    slow = Measured(100, False, 10)
    assert judge(percent, Measured(39, False, 0), slow).sure  # margin 11, error 5
    assert not judge(percent, Measured(41, False, 0), slow).sure
    assert judge(asked, Measured(0.1, True, 0.0), Measured(0.9, True, 0.0)).sure, "known exactly"
    assert not judge(asked, Measured(0.1, True, 0.01), Measured(0.9)).sure, (
        "how exactly the input is known nobody knows"
    )
    assert not judge(goal("threshold", 0.8), Measured(0.1), None).sure


def test_a_relative_goal_needs_a_baseline() -> None:
    assert not is_relative(goal("threshold", 1))
    assert judge(goal("threshold", 1), Measured(2), None).met
    assert is_relative(goal("max-degradation", 1))
    with pytest.raises(PlanError, match="compares with the input model, which was not measured"):
        judge(goal("max-degradation", 1), Measured(2), None)
