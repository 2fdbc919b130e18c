"""Figures of a classification against scikit-learn, and what free text and repeats do to them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest

from coldpress.errors import UsageError
from coldpress.evaluate.classification import accuracy, averaged, exact_match

LABELS = ["anger", "fear", "joy", "rare"]
RNG = np.random.default_rng(0)
TRUTH = RNG.choice(LABELS, 120, p=[0.4, 0.3, 0.25, 0.05]).tolist()
SAID = [true if RNG.random() < 0.7 else str(RNG.choice(LABELS[:3])) for true in TRUTH]
ROWS = list(range(120))


def figure(name: Any, said: list[str] = SAID, clusters: Any = None, **options: Any) -> Any:
    return averaged(name, TRUTH, said, clusters or ROWS, np.random.default_rng(0), known=LABELS, **options)


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@pytest.mark.parametrize("name", ["precision", "recall", "f1_score"])
def test_against_scikit_learn(name: Any, average: Literal["macro", "micro", "weighted"]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    oracle = getattr(metrics, f"{name}" if name == "f1_score" else f"{name}_score")
    found = figure(name, average=average)
    assert found.value == pytest.approx(oracle(TRUTH, SAID, average=average, zero_division=0))
    assert (found.unit, found.higher_is_better, found.n) == ("share", True, 120)
    assert 0 < found.standard_error < 0.15


def test_one_class_alone() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    found = figure("f1_score", average="binary", positive="joy")
    assert found.value == pytest.approx(metrics.f1_score(TRUTH, SAID, labels=["joy"], average=None)[0])
    with pytest.raises(UsageError, match="needs to know which answer is the positive one"):
        figure("f1_score", average="binary")
    with pytest.raises(UsageError, match="no answer is the positive one, 'grief'"):
        figure("f1_score", average="binary", positive="grief")


def test_free_text_is_wrong_but_no_class() -> None:
    said = [*SAID[:-1], "I would say joy"]
    truth_of_last = TRUTH[-1]
    found = figure("recall", said, average="macro")
    right = [sum(a == b == label for a, b in zip(said, TRUTH, strict=True)) / TRUTH.count(label) for label in LABELS]
    assert found.value == pytest.approx(sum(right) / 4), "four classes, not five"
    assert truth_of_last in LABELS
    micro = figure("precision", said, average="micro")
    hits = sum(a == b for a, b in zip(said, TRUTH, strict=True))
    assert micro.value == pytest.approx(hits / 119), "119 answers were classes"


def test_accuracy_and_exact_match() -> None:
    found = accuracy(TRUTH, SAID, ROWS)
    hits = sum(a == b for a, b in zip(SAID, TRUTH, strict=True))
    assert found.value == hits / 120
    assert found.standard_error == pytest.approx((found.value * (1 - found.value) / 120) ** 0.5)
    assert found.details["majority"] == max(TRUTH.count(label) for label in LABELS) / 120
    written = exact_match(["New York", "4", "no"], [" new  york\n", "four", "NO"], [0, 1, 2])
    assert written.value == pytest.approx(2 / 3)


def test_prompts_that_occur_twice_are_one_witness() -> None:
    once = figure("f1_score").standard_error
    twice = averaged(
        "f1_score", TRUTH * 2, SAID * 2, ROWS * 2, np.random.default_rng(0), known=LABELS
    ).standard_error  # fmt: skip
    alone = averaged(
        "f1_score", TRUTH * 2, SAID * 2, range(240), np.random.default_rng(0), known=LABELS
    ).standard_error  # fmt: skip
    assert twice == pytest.approx(once, rel=0.1)
    assert alone == pytest.approx(once / 2**0.5, rel=0.1)
