"""What a search is after, as pure functions of scores: objectives to make better, goals to keep.

loss        of an objective: its value, turned so that less is better
violation   of a goal that is missed: what lacks, as a share of what was asked
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coldpress.config.metrics import Evaluator, Metric
from coldpress.scores import GoalOutcome, Score

__all__ = ["Objective", "dearness", "is_cheap", "loss", "losses", "missed", "objectives_of", "violation"]

_DEARNESS = (
    ("size_on_disk",),
    ("divergence",),
    ("perplexity",),
    ("accuracy",),
    ("custom", "lm_eval"),
    ("load_time", "memory"),
    ("latency", "throughput", "generation"),
)
"""Types of metrics by what they take: a size is read, quality needs one run over the data, cost needs many."""
_RANKS = {kind: place for place, kinds in enumerate(_DEARNESS) for kind in kinds}


@dataclass(frozen=True)
class Objective:
    """A number to make better."""

    metric: str
    sub_type: str
    priority: int
    """1 decides first."""

    def of(self, scores: Iterable[Score]) -> Score | None:
        """The last score of this number; None where it was not measured."""
        found = [one for one in scores if (one.metric, one.sub_type) == (self.metric, self.sub_type)]
        return found[-1] if found else None

    def __str__(self) -> str:
        return self.metric if self.sub_type in ("", self.metric) else f"{self.metric} {self.sub_type}"


def objectives_of(evaluators: Iterable[Evaluator]) -> tuple[Objective, ...]:
    """Numbers with a priority, first priority first. Without any: those without a goal, else all, as they stand."""
    subs = {
        (metric.name, sub.name): sub
        for evaluator in evaluators
        for metric in evaluator.measured
        for sub in metric.sub_types
    }
    ranked = sorted((sub.priority, place, key) for place, (key, sub) in enumerate(subs.items()) if sub.priority > 0)
    if ranked:
        return tuple(Objective(*key, priority=priority) for priority, _, key in ranked)
    free = [key for key, sub in subs.items() if sub.goal is None] or list(subs)
    return tuple(Objective(*key, priority=place) for place, key in enumerate(free, 1))


def dearness(metric: Metric) -> tuple[int, bool]:
    """Sorts metrics in the order in which they are measured: what fails a goal fails early; of equals, goals first."""
    return _RANKS[metric.type], all(sub.goal is None for sub in metric.sub_types)


def is_cheap(metric: Metric) -> bool:
    """Whether it is read off the files, so that it is known before a proof would have begun."""
    return _RANKS[metric.type] == 0


def loss(score: Score) -> float:
    """Less is better."""
    return -score.value if score.higher_is_better else score.value


def losses(objectives: Sequence[Objective], scores: Iterable[Score]) -> tuple[float | None, ...]:
    """Of each objective, None where it was not measured."""
    scores = list(scores)
    found = [one.of(scores) for one in objectives]
    return tuple(None if score is None else loss(score) for score in found)


def missed(scores: Iterable[Score]) -> list[Score]:
    """Those that do not meet their goals."""
    return [score for score in scores if score.goal is not None and not score.goal.met]


def violation(goal: GoalOutcome) -> float:
    """0 where it is met; else what lacks, as a share of the bound (in the score's own unit where that is 0)."""
    return 0.0 if goal.met else max(-goal.margin, 0.0) / (abs(goal.bound) or 1.0)
