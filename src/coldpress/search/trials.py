"""Trials of a search, and what is concluded from them: the winner and why, the Pareto front, the nearest misses.

States: feasible (measured, and every goal met), infeasible (misses a goal; what is dearer was then not measured),
failed (a step or a measurement ended with an error), pruned (the plan proves that it is out of bounds: never run).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from coldpress.scores import Score
from coldpress.search.objectives import Objective, loss, losses, missed, violation
from coldpress.summary import SURE
from coldpress.units import quantity

__all__ = ["Choice", "State", "Trial", "choose", "dominates", "front", "nearest", "total_violation"]

State: TypeAlias = Literal["feasible", "infeasible", "failed", "pruned"]
_UNRANKED = 1e6
"""Violation of a trial that has no model: more than any goal's."""


@dataclass(frozen=True)
class Trial:
    """One setting of the search space, and what came of it."""

    number: int
    """From 1, in the order of asking."""
    point: Mapping[str, int] = field(repr=False)
    settings: Mapping[str, Any]
    """Name of a dimension -> its value."""
    state: State
    why: str = ""
    """What stopped it; empty for a feasible one."""
    scores: tuple[Score, ...] = field(default=(), repr=False)
    violation: float = 0.0
    """Of all goals together: 0 for a feasible trial, and beyond any goal's for one without a model."""
    key: str | None = None
    """Of its last step in the store; None where there is no model."""
    seconds: float = 0.0
    same_as: int | None = None
    """Trial that made the very same model."""

    @property
    def told(self) -> float:
        """Violation as the sampler is told it."""
        return self.violation if self.state in ("feasible", "infeasible") or self.violation else _UNRANKED


@dataclass(frozen=True)
class Choice:
    """The trial that is handed over, and the reason."""

    trial: Trial
    why: str


def choose(trials: Sequence[Trial], objectives: Sequence[Objective]) -> Choice | None:
    """The best feasible trial; None where there is none.

    Objective by objective: who is the best, and whoever differs from it by less than two standard errors, goes on to
    the next. What is still equal then is decided by the first objective's value, and at last by the order of trials.
    """
    left = [trial for trial in trials if trial.state == "feasible" and trial.same_as is None]
    if not left:
        return None
    feasible = len(left)
    reasons: list[str] = []
    for objective in objectives:
        scored = [(score, trial) for trial in left if (score := objective.of(trial.scores)) is not None]
        if len(left) == 1 or not scored:
            continue
        top, _ = min(scored, key=lambda pair: (loss(pair[0]), pair[1].number))
        left = [trial for score, trial in scored if not _differ(top, score)]
        figure = f"{objective}, {quantity(top.value, top.unit)}"
        if len(left) == 1:
            reasons.append(f"the best in {figure}")
        else:
            reasons.append(f"as good as the best in {figure} ({len(left)} are, within two standard errors)")
    winner = min(left, key=lambda trial: _key(trial, objectives))
    if feasible == 1:
        return Choice(winner, "the only one that meets every goal")
    if not reasons:
        return Choice(winner, f"the first of {feasible} that meet every goal")
    return Choice(winner, f"of {feasible} that meet every goal, {' and '.join(reasons)}")


def _key(trial: Trial, objectives: Sequence[Objective]) -> tuple[float, ...]:
    found = losses(objectives, trial.scores)
    return (*(math.inf if one is None else one for one in found), float(trial.number))


def _differ(best: Score, other: Score) -> bool:
    error = math.hypot(best.standard_error or 0.0, other.standard_error or 0.0)
    return abs(other.value - best.value) > SURE * error


def dominates(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether losses are nowhere greater, and somewhere less."""
    pairs = list(zip(mine, theirs, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def front(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Feasible trials that no other feasible trial beats in every objective."""
    measured: list[tuple[list[float], Trial]] = []
    for trial in trials:
        found = [one for one in losses(objectives, trial.scores) if one is not None]
        if trial.state == "feasible" and trial.same_as is None and len(found) == len(objectives):
            measured.append((found, trial))
    return [trial for mine, trial in measured if not any(dominates(theirs, mine) for theirs, _ in measured)]


def nearest(trials: Sequence[Trial], count: int = 3) -> list[Trial]:
    """Of the trials that miss goals, those that lack the least."""
    near = [one for one in trials if one.state in ("infeasible", "pruned") and one.violation and one.same_as is None]
    return sorted(near, key=lambda one: (one.violation, one.number))[:count]


def total_violation(scores: Sequence[Score]) -> float:
    """Of all goals that are missed."""
    return sum(violation(score.goal) for score in missed(scores) if score.goal is not None)
