"""What a score must reach: pure functions of goals and scores. A run shows them, a search takes them as constraints.

    v value of the goal, b score of the input model      higher is better      lower is better
    threshold                                            v                     v
    min-improvement                                      b + v                 b - v
    percent-min-improvement                              b + |b| v / 100       b - |b| v / 100
    max-degradation                                      b - v                 b + v
    percent-max-degradation                              b - |b| v / 100       b + |b| v / 100

Met is at the bound or better. The absolute value keeps percentages right of scores below zero (Olive's turn round).
Every sub type with a goal is judged, whether it has a priority or not.
"""

from __future__ import annotations

import math
from typing import Protocol

from coldpress.config.metrics import Goal
from coldpress.errors import PlanError
from coldpress.scores import GoalOutcome

__all__ = ["UNMET_EXIT_CODE", "Measured", "bound", "is_relative", "judge"]

UNMET_EXIT_CODE = 3
"""Of a command that is done, and whose result misses a goal."""
_SURE = 2.0
"""Standard errors."""


class Measured(Protocol):
    """What a goal looks at of a score."""

    @property
    def value(self) -> float: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def standard_error(self) -> float | None: ...


def is_relative(goal: Goal) -> bool:
    """Whether it asks for a comparison with the input model."""
    return goal.type != "threshold"


def bound(goal: Goal, baseline: Measured | None, *, higher_is_better: bool) -> float:
    """What a score must reach, in its own unit; raises PlanError for a relative goal without a baseline."""
    if not is_relative(goal):
        return goal.value
    if baseline is None:
        raise PlanError(
            f"the goal {goal.type} {goal.value:g} compares with the input model, which was not measured",
            hint="set evaluate_input_model to true, or use a threshold",
        )
    step = goal.value
    if goal.type.startswith("percent-"):
        step = abs(baseline.value) * goal.value / 100
    better = step if goal.type.endswith("min-improvement") else -step
    return baseline.value + (better if higher_is_better else -better)


def judge(goal: Goal, score: Measured, baseline: Measured | None) -> GoalOutcome:
    """Whether a score meets a goal, and by how much in its own unit."""
    wanted = bound(goal, baseline, higher_is_better=score.higher_is_better)
    margin = score.value - wanted if score.higher_is_better else wanted - score.value
    errors = [score.standard_error]
    if is_relative(goal) and baseline is not None:
        theirs, share = baseline.standard_error, _share_of_baseline(goal, score.higher_is_better)
        errors.append(None if theirs is None else theirs * share)
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) if len(known) == len(errors) else math.inf
    return GoalOutcome(
        type=goal.type,
        value=goal.value,
        bound=wanted,
        met=margin >= (-1e-12 * abs(wanted) if math.isfinite(wanted) else 0.0),  # the bound, whatever its last bit
        margin=margin,
        sure=error == 0 or abs(margin) > _SURE * error,
    )


def _share_of_baseline(goal: Goal, higher_is_better: bool) -> float:
    """How much the bound moves with the baseline."""
    if not goal.type.startswith("percent-"):
        return 1.0
    rises = goal.type.endswith("min-improvement") == higher_is_better
    return abs(1 + goal.value / 100 if rises else 1 - goal.value / 100)
