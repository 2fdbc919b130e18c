"""What a run comes to: every figure before and after, what the steps changed, and one line of verdict.

The terminal, the model card and the report say the same because they ask here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from coldpress.record import ParityRecord, RunRecord, ScoreRecord, StepRecord
from coldpress.units import quantity, spread

__all__ = [
    "SURE",
    "Comparison",
    "Measured",
    "comparisons",
    "lacks_text",
    "models_of",
    "number_name",
    "parity_text",
    "score_name",
    "verdict",
]

INPUT = "input"
SURE = 2.0
"""Standard errors by which two figures must differ to be called different."""


@dataclass(frozen=True)
class Measured:
    """One figure of one model."""

    value: float | None
    error: float | None
    n: int | None = None

    def text(self, unit: str) -> str:
        return f"{quantity(self.value, unit)} {spread(self.error, unit)}".rstrip()


@dataclass(frozen=True)
class Comparison:
    """One figure over the models that it was measured on, in the run's order."""

    name: str
    unit: str
    higher_is_better: bool
    models: Mapping[str, Measured]
    """By `input` and step name."""

    @property
    def before(self) -> Measured | None:
        """Of the input model."""
        return self.models.get(INPUT)

    @property
    def after(self) -> Measured | None:
        """Of the last model that was measured, unless that is the input."""
        last = list(self.models)[-1]
        return None if last == INPUT else self.models[last]

    @property
    def change(self) -> str:
        """From before to after: points of a share, else in percent; empty where one is missing."""
        if self.before is None or self.after is None or self.before.value is None or self.after.value is None:
            return ""
        difference = self.after.value - self.before.value
        if self.unit == "share":
            return f"{100 * difference:+.1f} points"
        return f"{difference / abs(self.before.value):+.0%}" if self.before.value else ""

    @property
    def judgement(self) -> str:
        """better, worse, the same (within two standard errors), or empty where nothing can be said.

        Nothing can where an error is not known; that of a size is 0.
        """
        if self.before is None or self.after is None or self.before.value is None or self.after.value is None:
            return ""
        if self.before.error is None or self.after.error is None:
            return ""
        difference = self.after.value - self.before.value
        error = math.hypot(self.before.error, self.after.error)
        if abs(difference) <= SURE * error or difference == 0:
            return "the same"
        return "better" if (difference > 0) == self.higher_is_better else "worse"


def number_name(metric: str, sub_type: str) -> str:
    """As people call a number: the metric, and the sub type where that says more."""
    return metric if sub_type in ("", metric, "accuracy_score") else f"{metric}: {sub_type}"


def score_name(score: ScoreRecord) -> str:
    """The name of a score's number."""
    return number_name(score.metric, score.sub_type)


def comparisons(record: RunRecord) -> list[Comparison]:
    """Every score and the size on disk, each over all models it is known of."""
    rows: dict[tuple[str, str], dict[str, Measured]] = {}
    first: dict[tuple[str, str], ScoreRecord] = {}
    for score in record.scores:
        key = (score.metric, score.sub_type)
        first.setdefault(key, score)
        rows.setdefault(key, {})[score.model] = Measured(score.value, score.standard_error, score.n)
    order = {name: place for place, name in enumerate(models_of(record))}
    found = [
        Comparison(
            score_name(first[key]),
            first[key].unit,
            first[key].higher_is_better,
            dict(sorted(models.items(), key=lambda item: order.get(item[0], len(order)))),
        )
        for key, models in rows.items()
    ]
    sizes = _sizes(record)
    if len(sizes) > 1 and not any("size_on_disk" in key or key[1] == "bytes" for key in rows):
        found.append(Comparison("weights on disk", "bytes", False, sizes))
    return found


class _Lacking(Protocol):
    """A trial of a search that misses goals."""

    @property
    def violation(self) -> float: ...
    @property
    def judged(self) -> bool: ...


def lacks_text(trial: _Lacking) -> str:
    """How much a trial lacks of its goals together; the least that it may, where not all of them were judged."""
    return f"lacks {'' if trial.judged else 'at least '}{quantity(100 * trial.violation, '%')}"


def models_of(record: RunRecord) -> list[str]:
    """`input` and the steps, in order: every name that a score may have."""
    return list(dict.fromkeys([INPUT, *(step.name for step in record.steps), *(s.model for s in record.scores)]))


def _sizes(record: RunRecord) -> dict[str, Measured]:
    known = {step.name: step.model for step in record.steps if step.model is not None}
    sizes = {name: Measured(float(model.bytes), 0.0) for name, model in known.items()}
    if record.input_model is None:
        return sizes
    return {INPUT: Measured(float(record.input_model.bytes), 0.0), **sizes}


def parity_text(parity: ParityRecord) -> str:
    """A comparison of a result with its input, in one line."""
    growth = "not a number"
    if parity.perplexity is not None and parity.perplexity_reference:
        growth = f"{parity.perplexity / parity.perplexity_reference - 1:+.1%}"
        if parity.standard_error is not None:
            growth += f" ± {parity.standard_error:.1%}"
    kl = "not a number" if parity.kl is None else f"{parity.kl:.2e}"
    agreement = "not a number" if parity.top1_agreement is None else f"{parity.top1_agreement:.1%}"
    return f"KL {kl}, same top token {agreement}, perplexity {growth}"


def verdict(record: RunRecord) -> str:
    """The run in one line."""
    if record.error is not None:
        where = f" in step {record.error.step}" if record.error.step else ""
        return f"Failed{where}: {record.error.message.splitlines()[0]}"
    said = [_compared(row) if record.steps else _measured(row) for row in comparisons(record)]
    proofs = [step for step in record.steps if step.parity is not None]
    if proofs:
        said.append(_proved(proofs))
    return "; ".join(part for part in said if part) or f"{len(record.steps)} steps done"


def _compared(row: Comparison) -> str:
    if row.after is None:
        return ""
    after = quantity(row.after.value, row.unit)
    if row.before is None:
        return f"{row.name} {after}"
    return f"{row.name} {quantity(row.before.value, row.unit)} → {after}"


def _measured(row: Comparison) -> str:
    """Of the one model that there is."""
    return "" if row.before is None else f"{row.name} {quantity(row.before.value, row.unit)}"


def _proved(steps: Sequence[StepRecord]) -> str:
    worst = max((step.parity.kl or 0.0 for step in steps if step.parity is not None), default=0.0)
    return f"{len(steps)} step{'s' * (len(steps) > 1)} proved against the input, KL at most {worst:.2g}"
