"""Figures of a proof against the limits of its step, and what is said of those that fail."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from coldpress.artifacts.base import Spec
from coldpress.config.schema import ParityLimits
from coldpress.engine.proof import judge, refuse_if_too_far
from coldpress.errors import ParityError
from coldpress.passes.base import Limits


def step(precision: str, kind: str = "onnx") -> Any:
    spec = Spec(kind=kind, config={"model_type": "llama"}, precision=precision)  # type: ignore[arg-type]
    return SimpleNamespace(name="build", spec=spec, limits=Limits(0.01, 0.01), parity=ParityLimits())


def figures(kl: float = 0.001, before: float = 10.0, after: float = 10.0, error: float = 0.001) -> dict[str, Any]:
    return {
        "kl": kl, "top1_agreement": 0.9, "perplexity_reference": before, "perplexity": after, "standard_error": error,
        "tokens": 100,
    }  # fmt: skip


def refusal(one: Any, **values: float) -> str:
    with pytest.raises(ParityError) as caught:
        refuse_if_too_far(one, judge(one, figures(**values)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("precision", "after", "error", "passed"),
    [
        ("int4", 10.0, 0.001, True),
        ("int4", 10.2, 0.001, False),
        ("int4", 10.2, 0.01, True),
        ("int4", 8.0, 0.001, True),
        ("fp16", 9.8, 0.001, True),
        ("fp32", 10.2, 0.001, False),
        ("fp32", 9.8, 0.001, False),
        ("fp32", 9.8, 0.01, True),
        ("fp32", 9.95, 0.001, True),
    ],
)
def test_perplexity_may_not_move_surely_beyond_its_limit(
    precision: str, after: float, error: float, passed: bool
) -> None:
    assert judge(step(precision), figures(after=after, error=error)).passed is passed


def test_the_texts_of_a_classifier_are_not_called_tokens() -> None:
    event = judge(step("int4"), {**figures(kl=1.0), "compared": "texts"})
    with pytest.raises(ParityError, match="on 100 texts; the limit"):
        refuse_if_too_far(step("int4"), event)


@pytest.mark.parametrize(("before", "after"), [(math.inf, 10.0), (10.0, math.inf), (math.inf, math.inf)])
def test_what_is_not_finite_never_passes(before: float, after: float) -> None:
    found = refusal(step("int4"), before=before, after=after, kl=0.0)
    assert "nan" not in found
    assert "(not a number)" in found
    assert ("the input itself is broken" in found) == (before == math.inf)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_where_nothing_is_rounded_the_limit_is_not_to_blame(precision: str) -> None:
    found = refusal(step(precision), kl=1.0)
    assert "weights, config.json and graph disagree" in found
    assert "max_kl is not the answer" in found
    assert "report the model family (llama)" in found
    assert "raise" not in found


def test_a_rounded_build_is_told_what_is_finer_than_it() -> None:
    assert "int8" in refusal(step("int4"), kl=1.0)
    found = refusal(step("int8"), kl=1.0)
    assert "int8" not in found
    assert "raise passes.build.parity.max_kl" in found
    assert "raise passes.build.parity.max_perplexity_increase" in refusal(step("int8"), after=11.0)
    assert "the adapter and this base" in refusal(step("bfloat16", "checkpoint"), kl=1.0)


def test_a_merge_that_agrees_on_text_that_neither_expects() -> None:
    """Next to nothing between the two, and yet the perplexity of a text that both find unlikely has grown."""
    said = refusal(step("bf16", "checkpoint"), after=11.0, kl=0.0005)
    assert "name text of the model's own kind in passes.build.parity.data_config" in said
