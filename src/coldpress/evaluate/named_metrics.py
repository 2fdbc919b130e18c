"""Metrics of other libraries by their names: torchmetrics' of a classification, and those of Hugging Face's evaluate.

They get classes as numbers, in the order of the labels (an evaluate metric that wants texts gets the labels). Their
errors are resampled, records with one prompt drawn together; fewer times than for our own figures, which are faster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldpress.config.metrics import TORCH_METRICS
from coldpress.errors import DataError, MissingExtraError, PlanError, StepError
from coldpress.evaluate.predictions import Predictions
from coldpress.evaluate.statistics import bootstrap_error
from coldpress.scores import Measurement

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["from_evaluate", "from_torchmetrics"]

_RESAMPLES = 100
_DERIVED = ("task", "num_classes", "num_labels")
"""Arguments of torchmetrics that the data answers."""


def from_torchmetrics(name: str, config: Mapping[str, Any], answers: Predictions, seed: int) -> Measurement:
    """A metric of `torchmetrics.classification`; `config` holds its arguments."""
    try:
        import torchmetrics.classification as library
    except ModuleNotFoundError as error:
        raise _missing("torchmetrics", error) from error
    import numpy as np
    import torch

    known = TORCH_METRICS[name]
    options = {**known.arguments, **{key: value for key, value in config.items() if key not in _DERIVED}}
    true, said = _numbers(answers, name)
    if known.of_scores and answers.scores is None:
        raise PlanError(
            f"{name} reads the score of every label, and a written answer has none", hint="use answer_by: likelihood"
        )
    scores = torch.from_numpy(_shares(answers.scores)) if known.of_scores else torch.from_numpy(said)
    targets = torch.from_numpy(true)
    try:
        metric = getattr(library, f"Multiclass{known.library_name}")(num_classes=len(answers.labels), **options)
    except (TypeError, ValueError) as error:
        raise PlanError(f"torchmetrics does not take these arguments for {name}: {error}") from error

    def value(rows: npt.NDArray[np.intp]) -> float:
        metric.reset()
        return float(metric(scores[rows], targets[rows]))

    found = value(np.arange(len(true)))
    spread = bootstrap_error(
        value, len(true), np.random.default_rng(seed), clusters=answers.prompts, resamples=_RESAMPLES
    )
    return _finite(Measurement(name, found, known.unit, known.higher_is_better, len(true), spread))


def _numbers(answers: Predictions, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Right and given answers as numbers of labels; raises DataError for an answer that is none."""
    import numpy as np

    codes = {label: place for place, label in enumerate(answers.labels)}
    odd = [one for one in answers.predicted if one not in codes]
    if odd:
        raise DataError(
            f"{len(odd)} of {len(answers.predicted)} written answers are no label, the first: {odd[0]!r}, so {name} "
            "cannot count them",
            hint="use answer_by: likelihood, or accuracy_score, f1_score ..., which count them as wrong",
        )
    return np.array([codes[one] for one in answers.truth]), np.array([codes[one] for one in answers.predicted])


def _shares(scores: npt.NDArray[np.float64] | None) -> npt.NDArray[np.float32]:
    """Probabilities of the labels among each other: [records, labels]."""
    import numpy as np

    assert scores is not None
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def from_evaluate(name: str, config: Mapping[str, Any], answers: Predictions, seed: int) -> Measurement:
    """A metric of the library `evaluate`: a name, or a folder with its script. Raises DataError where it is not here.

    `config` may hold load_params, compute_params, and result_key: where in the result the number is, in dots.
    """
    try:
        from datasets import Value

        import evaluate
    except ModuleNotFoundError as error:
        raise _missing("evaluate", error) from error
    import numpy as np

    try:
        metric = evaluate.load(name, **config.get("load_params", {}))
    except (OSError, ImportError, ValueError, TypeError) as error:
        raise DataError(
            f"the evaluate library cannot load the metric {name!r}: {type(error).__name__}: {error}",
            hint="give a folder with the metric's script, or let it be fetched once where there is a network",
        ) from error
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    wants_text = isinstance(features["predictions"], Value) and features["predictions"].dtype == "string"
    true: Any = np.array(answers.truth)
    said: Any = np.array(answers.predicted)
    if not wants_text:
        true, said = _numbers(answers, name)
    options = dict(config.get("compute_params", {}))
    key = config.get("result_key", Path(name).name)

    def value(rows: npt.NDArray[np.intp]) -> float:
        result = metric.compute(predictions=said[rows].tolist(), references=true[rows].tolist(), **options)
        return _picked(result, key, name)

    found = value(np.arange(len(true)))
    spread = bootstrap_error(
        value, len(true), np.random.default_rng(seed), clusters=answers.prompts, resamples=_RESAMPLES
    )
    return _finite(Measurement(name, found, "", True, len(true), spread))


def _picked(result: Any, key: str, name: str) -> float:
    for part in key.split("."):
        if not isinstance(result, Mapping) or part not in result:
            there = ", ".join(map(str, result)) if isinstance(result, Mapping) else repr(result)
            raise PlanError(
                f"the metric {name} gives no {key!r}; it gives: {there}", hint="name the number in result_key"
            )
        result = result[part]
    return float(result)


def _finite(found: Measurement) -> Measurement:
    if not math.isfinite(found.value):
        raise StepError(
            f"{found.sub_type} is {found.value:g}, which is no number",
            hint="does every class occur? Some metrics are undefined where one does not",
        )
    return found


def _missing(package: str, error: ModuleNotFoundError) -> MissingExtraError:
    return MissingExtraError(
        f"this metric needs the package {error.name or package}", hint="pip install 'coldpress[eval]'"
    )
