"""Progress as typed values. A sink is any callable that takes an `Event`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "EvaluationLoss",
    "Event",
    "Message",
    "ParityMeasured",
    "Progress",
    "RunFailed",
    "RunFinished",
    "RunStarted",
    "ScoreMeasured",
    "SearchFinished",
    "SearchStarted",
    "Sink",
    "StepFailed",
    "StepFinished",
    "StepStarted",
    "TrialFinished",
    "TrialStarted",
    "event_from_dict",
    "event_to_dict",
    "event_to_json",
]


@dataclass(frozen=True)
class RunStarted:
    workflow: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class StepStarted:
    step: str
    kind: str
    """Pass type, or `parity`, `evaluate`."""
    key: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Progress:
    """Where a step stands. `values` are figures worth showing.

    `loss`, `eval_loss`, `best_eval_loss` in nats per token; `learning_rate`, `grad_norm`; `tokens_per_second`;
    `eta_seconds`; `memory_bytes`, the resident memory of the step's process.
    """

    step: str
    done: float
    total: float
    unit: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationLoss:
    """Loss on held-out data, in the middle of a training or at its end. Nats per token."""

    step: str
    at: int
    """Training steps made."""
    loss: float
    best: float
    """The lowest so far, this one included."""
    best_at: int


@dataclass(frozen=True)
class Message:
    level: Literal["debug", "info", "warning", "error"]
    text: str
    step: str = ""


@dataclass(frozen=True)
class ParityMeasured:
    step: str
    kl: float
    """Mean KL divergence, nats per token."""
    top1_agreement: float
    perplexity_reference: float
    perplexity: float
    standard_error: float
    """Of the logarithm of the perplexities' ratio."""
    tokens: int
    passed: bool
    limit: str
    reference: str = "whole"
    """How the reference was computed: layer by layer, or whole."""
    compared: str = "tokens"
    """What was compared and counted: tokens of text, or whole texts, which is what a classifier answers."""

    @property
    def growth(self) -> str:
        """Of the perplexity, with its standard error, as people read it."""
        if not (math.isfinite(self.perplexity) and math.isfinite(self.perplexity_reference)):
            return "not a number"
        return f"{self.perplexity / self.perplexity_reference - 1:+.1%} ± {self.standard_error:.1%}"


@dataclass(frozen=True)
class ScoreMeasured:
    model: str
    """`input`, or the name of the step whose result was measured."""
    metric: str
    value: float
    standard_error: float | None
    """None where there is nothing to estimate it from."""
    n: int
    """What it was measured on: records, tokens, repeats."""
    cached: bool = False
    unit: str = ""
    """share, bytes, ms ...; empty for a bare number."""
    sub_type: str = ""
    higher_is_better: bool = True
    goal: str | None = None
    """What the config asks of it, in its words."""
    goal_bound: float | None = None
    """What that comes to, in the unit of the score."""
    goal_met: bool | None = None

    @property
    def name(self) -> str:
        """As people call it: the metric, and the sub type where that says more."""
        plain = self.sub_type in ("", self.metric, "accuracy_score")
        return self.metric if plain else f"{self.metric}: {self.sub_type}"


@dataclass(frozen=True)
class StepFinished:
    step: str
    kind: str
    cached: bool
    seconds: float
    peak_bytes: int | None = None
    """Highest resident memory of the step's process, in bytes."""
    peak_anonymous_bytes: int | None = None
    """The part of it that no file backs."""
    output: str = ""


@dataclass(frozen=True)
class StepFailed:
    step: str
    kind: str
    error: str


@dataclass(frozen=True)
class SearchStarted:
    workflow: str
    sampler: str
    space: int
    """Settings there are."""
    trials: int
    """Settings that will be tried at most."""


@dataclass(frozen=True)
class TrialStarted:
    """What its steps and scores tell comes with `trial N` before their names, until it is finished."""

    number: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class TrialFinished:
    number: int
    settings: Mapping[str, Any]
    state: str
    """feasible; infeasible; unproved: another trial is no worse, so it was not proved; failed; or pruned: not run,
    because the plan proves that it is out of bounds."""
    why: str
    """What stopped it; empty for a feasible one."""
    figures: Mapping[str, str]
    """What was measured, as people read it."""
    seconds: float
    best: bool
    """Whether it is the best so far."""


@dataclass(frozen=True)
class SearchFinished:
    trials: int
    feasible: int
    winner: int | None
    """Number of the trial that is handed over; None where there is no model to hand over."""
    why: str
    seconds: float
    stopped: str = ""
    """What ended it before every setting was tried; empty where all were."""
    unproved: int = 0
    """Trials that others are no worse than, so that they were not proved."""


@dataclass(frozen=True)
class RunFailed:
    """The end of a run that did not reach its end; also of one that was refused before it began."""

    error: str
    """Class name, from `coldpress.errors`."""
    message: str
    hint: str | None
    exit_code: int


@dataclass(frozen=True)
class RunFinished:
    output: str
    seconds: float
    record: str


Event = (
    RunStarted
    | StepStarted
    | Progress
    | EvaluationLoss
    | Message
    | ParityMeasured
    | ScoreMeasured
    | StepFinished
    | StepFailed
    | SearchStarted
    | TrialStarted
    | TrialFinished
    | SearchFinished
    | RunFailed
    | RunFinished
)
Sink = Callable[[Event], None]

_TYPES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        RunStarted,
        StepStarted,
        Progress,
        EvaluationLoss,
        Message,
        ParityMeasured,
        ScoreMeasured,
        StepFinished,
        StepFailed,
        SearchStarted,
        TrialStarted,
        TrialFinished,
        SearchFinished,
        RunFailed,
        RunFinished,
    )
}


def event_to_dict(event: Event) -> dict[str, Any]:
    return {"event": type(event).__name__, **dataclasses.asdict(event)}


def event_to_json(event: Event) -> str:
    return json.dumps(event_to_dict(event), ensure_ascii=False)


def event_from_dict(data: Mapping[str, Any]) -> Event:
    """Inverse of `event_to_dict`; raises KeyError for an unknown event name."""
    fields = {key: value for key, value in data.items() if key != "event"}
    if "steps" in fields:
        fields["steps"] = tuple(fields["steps"])
    event: Event = _TYPES[data["event"]](**fields)
    return event
