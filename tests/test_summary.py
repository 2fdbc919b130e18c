"""Before and after, as every display says it."""

from __future__ import annotations

from typing import Any

import pytest

from coldpress.record import ErrorRecord, ModelRecord, ParityRecord, RunRecord, ScoreRecord, StepRecord
from coldpress.summary import Comparison, Measured, comparisons, parity_text, verdict
from coldpress.units import apart, quantity, spread, wanted

MACHINE = {
    "system": "Linux",
    "machine": "x86_64",
    "processor": "p",
    "cores": 2,
    "threads": 2,
    "memory": 8,
    "available": 4,
}


def parity(**more: Any) -> ParityRecord:
    figures: dict[str, Any] = {
        "kl": 0.0235, "top1_agreement": 0.879, "perplexity_reference": 20.0, "perplexity": 21.0,
        "standard_error": 0.004, "tokens": 4096, "passed": True, "limit": "KL 0.1",
    }  # fmt: skip
    return ParityRecord(**{**figures, **more})


def step(name: str, weights: int, **more: Any) -> StepRecord:
    model = ModelRecord(kind="checkpoint", model_type="phi3", bytes=weights)
    return StepRecord(
        name=name, type="LoRA", key="k", cached=False, seconds=1.0, peak_bytes=1, peak_anonymous_bytes=1, path="p",
        model=model, **more,
    )  # fmt: skip


def score(model: str, value: float | None, metric: str = "accuracy", **more: Any) -> ScoreRecord:
    return ScoreRecord(**{"model": model, "metric": metric, "value": value, "n": 200, "unit": "share", **more})


def run(*, steps: tuple[StepRecord, ...] = (), scores: tuple[ScoreRecord, ...] = (), **more: Any) -> RunRecord:
    return RunRecord.model_validate(
        {
            "coldpress": "0.1", "started": "now", "seconds": 1.0, "config_file": None, "dialect": "today", "config": {},
            "hardware": MACHINE, "libraries": {}, "input": {}, "steps": steps, "scores": scores,
            "input_model": ModelRecord(kind="checkpoint", model_type="phi3", bytes=14_400_000), **more,
        }
    )  # fmt: skip


def test_every_score_before_and_after_and_the_size() -> None:
    rows = comparisons(
        run(
            steps=(step("lora", 21_000_000), step("int4", 5_200_000)),
            scores=(
                score("input", 0.25, standard_error=0.03),
                score("lora", 0.95, standard_error=0.015),
                score("int4", 0.945, standard_error=0.016),
                score("input", 12.0, "latency", sub_type="p50", unit="ms", higher_is_better=False, standard_error=0.1),
                score("int4", 3.0, "latency", sub_type="p50", unit="ms", higher_is_better=False, standard_error=0.1),
            ),
        )
    )
    accuracy, latency, weights = rows
    assert (accuracy.name, accuracy.change, accuracy.judgement) == ("accuracy", "+69.5 points", "better")
    assert list(accuracy.models) == ["input", "lora", "int4"]
    assert (latency.name, latency.change, latency.judgement) == ("latency: p50", "-75%", "better")
    assert (weights.name, weights.change, weights.judgement) == ("weights on disk", "-64%", "better")


def test_models_stand_in_the_order_of_the_run_whatever_was_measured_first() -> None:
    (row, _) = comparisons(
        run(steps=(step("a", 1), step("b", 1)), scores=(score("b", 0.3), score("a", 0.2), score("input", 0.1)))
    )
    assert list(row.models) == ["input", "a", "b"]
    assert row.after == Measured(0.3, None, 200)


@pytest.mark.parametrize(
    ("before", "after", "error", "higher", "says"),
    [
        (0.50, 0.60, 0.03, True, "better"),
        (0.60, 0.50, 0.03, True, "worse"),
        (0.50, 0.60, 0.03, False, "worse"),
        (0.50, 0.58, 0.03, True, "the same"),  # 0.08 is within 2 sqrt(2) 0.03 = 0.085
        (0.50, 0.50, 0.0, True, "the same"),
        (0.50, 0.51, 0.0, True, "better"),
        (0.50, 0.51, None, True, ""),
        (None, 0.51, None, True, ""),
    ],
)
def test_a_difference_within_its_error_is_none(
    before: float | None, after: float, error: float | None, higher: bool, says: str
) -> None:
    row = Comparison("x", "share", higher, {"input": Measured(before, error), "end": Measured(after, error)})
    assert row.judgement == says


def test_one_side_alone_is_no_comparison() -> None:
    only_after = Comparison("x", "share", True, {"end": Measured(0.5, 0.1)})
    assert (only_after.before, only_after.change, only_after.judgement) == (None, "", "")
    only_before = Comparison("x", "share", True, {"input": Measured(0.5, 0.1)})
    assert (only_before.after, only_before.change) == (None, "")
    nothing_before = Comparison("x", "ms", False, {"input": Measured(0.0, 0.0), "end": Measured(2.0, 0.0)})
    assert (nothing_before.change, nothing_before.judgement) == ("", "worse")


def test_a_size_that_an_evaluator_measured_stands_alone() -> None:
    record = run(steps=(step("a", 5),), scores=(score("a", 5.0, "size_on_disk", unit="bytes"),))
    assert [row.name for row in comparisons(record)] == ["size_on_disk"]


def test_the_verdict() -> None:
    record = run(
        steps=(step("lora", 14_400_000), step("int4", 5_200_000, parity=parity())),
        scores=(score("input", 0.25), score("int4", 0.945)),
    )
    assert verdict(record) == (
        "accuracy 25.0 % → 94.5 %; weights on disk 14.4 MB → 5.2 MB; 1 step proved against the input, KL at most 0.024"
    )
    failed = run(error=ErrorRecord(type="StepError", message="it broke\nmore", step="lora", exit_code=1))
    assert verdict(failed) == "Failed in step lora: it broke"
    assert verdict(run(input_model=None)) == "0 steps done"


def test_a_comparison_that_is_not_a_number() -> None:
    assert parity_text(parity()) == "KL 2.35e-02, same top token 87.9%, perplexity +5.0% ± 0.4%"
    broken = parity_text(parity(kl=None, perplexity=None, top1_agreement=None))
    assert broken == "KL not a number, same top token not a number, perplexity not a number"


def test_measured_values_as_people_read_them() -> None:
    measured = [(0.945, "share"), (5.2e6, "bytes"), (12.3456, "ms"), (123456.7, "tokens/s")]
    errors = [(0.016, "share"), (0.1234, "ms"), (None, "ms"), (1e6, "bytes"), (0.0, "bytes")]
    assert [quantity(*one) for one in measured] == ["94.5 %", "5.2 MB", "12.35 ms", "123,457 tokens/s"]
    assert [quantity(None, "ms"), quantity(float("nan"), "ms"), quantity(2.0, "")] == [
        "not a number",
        "not a number",
        "2",
    ]
    assert [spread(error, unit) for error, unit in errors] == [
        "± 1.6", "± 0.12", "", "± 1.0 MB", "",
    ]  # fmt: skip


def test_what_differs_is_not_written_alike() -> None:
    assert apart(5_200_000, 6_600_000, "bytes") == ("5.2 MB", "6.6 MB")
    assert apart(6_604_000, 6_600_000, "bytes") == ("6.604 MB", "6.600 MB")
    assert apart(0.98004, 0.98, "share") == ("98.004 %", "98.000 %")
    assert apart(12345.25, 12345.0, "") == ("12,345.2", "12,345.0")
    assert apart(2.0, 2.0, "ms") == ("2 ms", "2 ms")
    assert apart(None, 2.0, "ms") == ("not a number", "2 ms")
    assert wanted(6_604_000, 6_600_000, "bytes", higher_is_better=False) == "6.604 MB, wanted at most 6.600 MB"
    assert wanted(0.5, 0.75, "share", higher_is_better=True) == "50.0 %, wanted at least 75.0 %"
