"""Trials of a search, and what is concluded from them: the winner and why, the Pareto front, the nearest misses.

States: feasible (measured, proved, and every goal met), infeasible (misses a goal; what is dearer was then not
measured), unproved (another trial is no worse in every objective, so neither proved nor measured further), failed (a
step, its proof or a measurement ended with an error), pruned (the plan proves that it is out of bounds: never run).
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

__all__ = [
    "Choice",
    "State",
    "Trial",
    "choose",
    "dominates",
    "front",
    "nearest",
    "no_worse",
    "ranked",
    "total_violation",
]

State: TypeAlias = Literal["feasible", "infeasible", "unproved", "failed", "pruned"]
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
    """Of its goals together: 0 for a feasible trial. The least that it may be, where not all of them are `judged`."""
    judged: bool = True
    """Whether every goal is; what misses one is measured no further, and of a plan the size alone is known."""
    key: str | None = None
    """Of its last step in the store; None where there is no model."""
    seconds: float = 0.0
    same_as: int | None = None
    """Trial that made the very same model."""
    proved: bool = True
    """Whether its last step is, or needs no proof."""

    @property
    def told(self) -> float:
        """Violation as the sampler is told it."""
        known = self.state in ("feasible", "infeasible", "unproved")
        return self.violation if known or self.violation else _UNRANKED


@dataclass(frozen=True)
class Choice:
    """The trial that is handed over, and the reason."""

    trial: Trial
    why: str


def choose(trials: Sequence[Trial], objectives: Sequence[Objective]) -> Choice | None:
    """The best feasible trial; None where there is none.

    Objective by objective: who is the best, and whoever differs from it by less than two standard errors, goes on to
    the next. A figure whose error is not known counts as it stands. What is still equal then is decided by the first
    objective's value, and at last by the order of trials.
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
        unknown = " (its error is not known)" if top.standard_error is None else ""
        figure = f"{objective}, {quantity(top.value, top.unit)}{unknown}"
        if len(left) == 1:
            reasons.append(f"the best in {figure}")
        else:
            reasons.append(f"as good as the best in {figure} ({len(left)} are, within two standard errors)")
    winner = min(left, key=lambda trial: _key(trial, objectives))
    out = sum(trial.state == "unproved" and trial.same_as is None for trial in trials)
    if feasible == 1:
        why = "it meets every goal" if out else "the only one that meets every goal"
    elif not reasons:
        why = f"the first of {feasible} that meet every goal"
    else:
        why = f"of {feasible} that meet every goal, {' and '.join(reasons)}"
    return Choice(winner, f"{why}; {out} more {'are' if out > 1 else 'is'} no better and not proved" if out else why)


def ranked(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Best first: the feasible ones, then those that are not proved, then by what they lack; none without a model."""
    left = [trial for trial in trials if trial.key is not None and trial.state != "failed"]
    ordered: list[Trial] = []
    while left:
        choice = choose(left, objectives)
        best = choice.trial if choice else min(left, key=lambda one: (one.violation, *_key(one, objectives)))
        ordered.append(best)
        left.remove(best)
    return ordered


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


def no_worse(scores: Sequence[Score], rivals: Sequence[Trial], objectives: Sequence[Objective]) -> Trial | None:
    """The first of the rivals that is feasible and at least as good in every objective.

    None as long as an objective was not measured, or not exactly: within its error either may be chosen.
    """
    mine = _exact(scores, objectives)
    for rival in rivals:
        theirs = _exact(rival.scores, objectives) if rival.state == "feasible" else None
        if mine is not None and theirs is not None and all(a <= b for a, b in zip(theirs, mine, strict=True)):
            return rival
    return None


def _exact(scores: Sequence[Score], objectives: Sequence[Objective]) -> list[float] | None:
    """Losses of all objectives; None where one is not known, or not exactly."""
    found = [objective.of(scores) for objective in objectives]
    known = [loss(score) for score in found if score is not None and score.standard_error == 0]
    return known if len(known) == len(objectives) else None


def front(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Feasible trials that no other feasible trial beats in every objective."""
    measured: list[tuple[list[float], Trial]] = []
    for trial in trials:
        found = [one for one in losses(objectives, trial.scores) if one is not None]
        if trial.state == "feasible" and trial.same_as is None and len(found) == len(objectives):
            measured.append((found, trial))
    return [trial for mine, trial in measured if not any(dominates(theirs, mine) for theirs, _ in measured)]


def nearest(trials: Sequence[Trial], count: int = 3) -> list[Trial]:
    """Of the trials that miss goals, those that lack the least as far as is known; those without a model come last."""
    near = [one for one in trials if one.state in ("infeasible", "pruned") and one.violation and one.same_as is None]
    return sorted(near, key=lambda one: (one.key is None, one.violation, one.number))[:count]


def total_violation(scores: Sequence[Score]) -> float:
    """Of all goals that are missed."""
    return sum(violation(score.goal) for score in missed(scores) if score.goal is not None)
