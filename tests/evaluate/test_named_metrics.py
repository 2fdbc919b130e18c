"""Metrics of other libraries, by name, equal what the libraries say of the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.config.metrics import TORCH_METRICS
from coldpress.errors import DataError, PlanError, StepError
from coldpress.evaluate.named_metrics import from_evaluate, from_torchmetrics
from coldpress.evaluate.predictions import Predictions

LABELS = ("anger", "fear", "joy")
RNG = np.random.default_rng(0)
SCORES = np.log(RNG.dirichlet((1, 1, 1), 60))
TRUTH = tuple(LABELS[place] for place in np.where(RNG.random(60) < 0.6, SCORES.argmax(axis=1), RNG.integers(0, 3, 60)))
SAID = tuple(LABELS[place] for place in SCORES.argmax(axis=1))
ANSWERS = Predictions(TRUTH, SAID, LABELS, tuple(map(str, range(60))), scores=SCORES)


@pytest.mark.parametrize("name", sorted(TORCH_METRICS))
def test_every_metric_of_torchmetrics_runs(name: str) -> None:
    pytest.importorskip("torchmetrics")
    found = from_torchmetrics(name, {"task": "multiclass", "num_classes": 3}, ANSWERS, 0)
    assert found.n == 60
    assert found.standard_error is not None
    assert 0 < found.standard_error < 0.2
    assert found == from_torchmetrics(name, {}, ANSWERS, 0), "the seed decides, the data says how many classes"


def test_against_scikit_learn() -> None:
    pytest.importorskip("torchmetrics")
    metrics = pytest.importorskip("sklearn.metrics")
    shares = np.exp(SCORES)
    oracles = {
        "auroc": metrics.roc_auc_score(TRUTH, shares, multi_class="ovr", average="macro", labels=LABELS),
        "cohen_kappa": metrics.cohen_kappa_score(TRUTH, SAID),
        "matthews_corrcoef": metrics.matthews_corrcoef(TRUTH, SAID),
        "jaccard_index": metrics.jaccard_score(TRUTH, SAID, average="macro"),
    }
    for name, expected in oracles.items():
        # 1e-5: torchmetrics computes in float32.
        assert from_torchmetrics(name, {}, ANSWERS, 0).value == pytest.approx(expected, abs=1e-5), name


def test_beta_is_one_unless_the_config_says_otherwise() -> None:
    pytest.importorskip("torchmetrics")
    scores = pytest.importorskip("sklearn.metrics")
    for config, beta in (({}, 1.0), ({"beta": 2.0}, 2.0)):
        found = from_torchmetrics("fbeta_score", config, ANSWERS, 0).value
        assert found == pytest.approx(scores.fbeta_score(TRUTH, SAID, beta=beta, average="macro"), abs=1e-5)


def test_directions() -> None:
    pytest.importorskip("torchmetrics")
    assert not from_torchmetrics("hamming_distance", {}, ANSWERS, 0).higher_is_better
    assert from_torchmetrics("specificity", {}, ANSWERS, 0).higher_is_better


def test_arguments_and_answers_that_do_not_fit() -> None:
    pytest.importorskip("torchmetrics")
    with pytest.raises(PlanError, match="does not take these arguments for jaccard_index"):
        from_torchmetrics("jaccard_index", {"avrage": "macro"}, ANSWERS, 0)
    written = Predictions(TRUTH, ("so angry", *SAID[1:]), LABELS, ANSWERS.prompts)
    with pytest.raises(DataError, match=r"1 of 60 written answers are no label, the first: 'so angry'"):
        from_torchmetrics("cohen_kappa", {}, written, 0)
    clean = Predictions(TRUTH, SAID, LABELS, ANSWERS.prompts)
    with pytest.raises(PlanError, match="auroc reads the score of every label"):
        from_torchmetrics("auroc", {}, clean, 0)


SCRIPT = """
import datasets
import evaluate

VALUE = datasets.Value("{dtype}")


class {name}(evaluate.Metric):
    def _info(self):
        features = datasets.Features({{"predictions": VALUE, "references": VALUE}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, weight=1.0):
        share = sum(a == b for a, b in zip(predictions, references)) / len(references)
        return {{"deep": {{"share": weight * share}}, "nothing": float("nan"), "first": predictions[0]}}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A metric of one's own, for the evaluate library to load; it keeps its modules for the whole process."""
    pytest.importorskip("evaluate")
    place = tmp_path_factory.mktemp("evaluate")

    def make(name: str, dtype: str) -> str:
        folder = place / name
        folder.mkdir()
        (folder / f"{name}.py").write_text(SCRIPT.format(name=name.capitalize(), dtype=dtype))
        return str(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_MODULES_CACHE", place / "modules")
        patch.setattr("evaluate.config.HF_METRICS_CACHE", str(place / "metrics"))
        yield make


@pytest.mark.parametrize("dtype", ["int32", "string"])
def test_a_metric_of_evaluate(own: Any, dtype: str) -> None:
    name = own(f"same{dtype}", dtype)
    share = sum(a == b for a, b in zip(TRUTH, SAID, strict=True)) / 60
    found = from_evaluate(name, {"result_key": "deep.share"}, ANSWERS, 0)
    assert found.value == share
    assert found.standard_error == pytest.approx((share * (1 - share) / 60) ** 0.5, rel=0.3)  # 100 draws
    heavy = from_evaluate(name, {"result_key": "deep.share", "compute_params": {"weight": 2.0}}, ANSWERS, 0)
    assert heavy.value == 2 * share
    if dtype == "int32":
        assert from_evaluate(name, {"result_key": "first"}, ANSWERS, 0).value == LABELS.index(SAID[0])
    with pytest.raises(PlanError, match=r"gives no 'deep\.shre'; it gives: share") as caught:
        from_evaluate(name, {"result_key": "deep.shre"}, ANSWERS, 0)
    assert "result_key" in str(caught.value.hint)
    with pytest.raises(StepError, match="which is no number"):
        from_evaluate(name, {"result_key": "nothing"}, ANSWERS, 0)


def test_a_metric_of_evaluate_that_is_not_here(own: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot load the metric"):
        from_evaluate(str(tmp_path / "nowhere"), {}, ANSWERS, 0)
