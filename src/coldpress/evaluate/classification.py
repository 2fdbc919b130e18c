"""Figures of a classification: accuracy, precision, recall, F1, exact match. Pure functions of answers and truth.

    tp_k, fp_k, fn_k    of class k: rightly said, wrongly said, wrongly not said
    precision_k         tp / (tp + fp)        recall_k  tp / (tp + fn)        F1_k  2 tp / (2 tp + fp + fn)
    macro               mean over the classes that occur in the truth or among the answers
    weighted            the same, each class by its share of the truth
    micro               of the sums over all classes
    binary              of the one class that is called positive

A quotient whose denominator is 0 is 0, as scikit-learn has it. An answer that is no label (free text of a generation)
is wrong: the record counts for its true class's recall, and for nobody's precision.

Errors: accuracy and exact match are means (clustered by prompt); the rest is resampled, clusters drawn whole.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Literal

from coldpress.errors import UsageError
from coldpress.evaluate.statistics import bootstrap_error, mean_error
from coldpress.scores import Measurement

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Average", "accuracy", "averaged", "exact_match"]

Average = Literal["macro", "micro", "weighted", "binary"]


def accuracy(truth: Sequence[str], predicted: Sequence[str], clusters: Sequence[Hashable]) -> Measurement:
    """Share of records whose answer is the right one."""
    right = [float(said == true) for said, true in zip(predicted, truth, strict=True)]
    value, error = mean_error(right, clusters)
    majority = max(truth.count(label) for label in set(truth)) / len(truth)
    return Measurement("accuracy_score", value, "share", True, len(truth), error, {"majority": majority})


def exact_match(truth: Sequence[str], said: Sequence[str], clusters: Sequence[Hashable]) -> Measurement:
    """Share of generated answers that are the right one, up to white space and upper case."""
    right = [float(_plain(one) == _plain(true)) for one, true in zip(said, truth, strict=True)]
    value, error = mean_error(right, clusters)
    return Measurement("exact_match", value, "share", True, len(truth), error)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().casefold()


def averaged(
    name: Literal["precision", "recall", "f1_score"],
    truth: Sequence[str],
    predicted: Sequence[str],
    clusters: Sequence[Hashable],
    rng: np.random.Generator,
    *,
    known: Sequence[str],
    average: Average = "macro",
    positive: str | None = None,
) -> Measurement:
    """Precision, recall or F1 of all classes, or of the positive one. An answer that is not `known` is no class."""
    import numpy as np

    labels = sorted(set(truth) | (set(predicted) & set(known)))
    if average == "binary":
        if positive is None:
            raise UsageError(
                f"average: binary needs to know which answer is the positive one ({', '.join(labels[:8])})",
                hint="add positive to metric_config, or use average: macro",
            )
        if positive not in labels:
            raise UsageError(f"no answer is the positive one, {positive!r}; there are: {', '.join(labels[:8])}")
    codes = {label: place for place, label in enumerate(labels)}
    true = np.array([codes[one] for one in truth])
    said = np.array([codes.get(one, len(labels)) for one in predicted])
    only = None if positive is None or average != "binary" else codes[positive]

    def value(rows: npt.NDArray[np.intp]) -> float:
        return _figure(name, true[rows], said[rows], len(labels), average, only)

    error = bootstrap_error(value, len(truth), rng, clusters=clusters)
    return Measurement(name, value(np.arange(len(truth))), "share", True, len(truth), error, {"average": average})


def _figure(
    name: str, true: npt.NDArray[np.intp], said: npt.NDArray[np.intp], classes: int, average: Average, only: int | None
) -> float:
    import numpy as np

    right = np.bincount(true[true == said], minlength=classes + 1)[:classes].astype(float)
    asked = np.bincount(true, minlength=classes + 1)[:classes].astype(float)
    told = np.bincount(said, minlength=classes + 1)[:classes].astype(float)
    if only is not None:
        right, asked, told = right[[only]], asked[[only]], told[[only]]
    elif average == "micro":
        right, asked, told = right.sum(keepdims=True), asked.sum(keepdims=True), told.sum(keepdims=True)
    top = {"precision": right, "recall": right, "f1_score": 2 * right}[name]
    bottom = {"precision": told, "recall": asked, "f1_score": told + asked}[name]
    each = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    if len(each) == 1:
        return float(each[0])
    weights = asked if average == "weighted" else ((asked + told) > 0).astype(float)
    return float((each * weights).sum() / weights.sum())
