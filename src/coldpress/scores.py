"""A measured number, with what is needed to read it: unit, direction, count, standard error, what was asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["GoalOutcome", "Measurement", "Score"]


@dataclass(frozen=True)
class Measurement:
    """One number of a metric, as the metric gives it."""

    sub_type: str
    value: float
    unit: str
    """share, nats/token, ms, tokens/s, bytes ...; empty for a bare number."""
    higher_is_better: bool
    n: int
    """What it was measured on: records, tokens, repeats."""
    standard_error: float | None
    """0 of what is exact (a size); None where there is nothing to estimate it from: a single run, text or prompt."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """How it was measured: repeats, warm-up, load of the machine ..."""


@dataclass(frozen=True)
class GoalOutcome:
    """What a goal asked of a score, and what came of it."""

    type: str
    """threshold, min-improvement, percent-min-improvement, max-degradation, percent-max-degradation."""
    value: float
    bound: float
    """What the score must reach, in its own unit."""
    met: bool
    margin: float
    """By how much, in the score's unit: positive is better than asked, negative is what lacks."""
    sure: bool
    """Whether the margin is more than two standard errors away from nothing; not where an error is unknown."""


@dataclass(frozen=True)
class Score:
    """A measured number of one model in a run."""

    model: str
    """`input`, or the name of the step whose result was measured."""
    metric: str
    """The metric's name in the config."""
    sub_type: str
    value: float
    unit: str
    higher_is_better: bool
    n: int
    standard_error: float | None
    priority: int = -1
    goal: GoalOutcome | None = None
    cached: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str, metric: str, found: Measurement, *, priority: int = -1, cached: bool = False) -> Score:
        return cls(
            model=model,
            metric=metric,
            sub_type=found.sub_type,
            value=found.value,
            unit=found.unit,
            higher_is_better=found.higher_is_better,
            n=found.n,
            standard_error=found.standard_error,
            priority=priority,
            cached=cached,
            details=found.details,
        )
