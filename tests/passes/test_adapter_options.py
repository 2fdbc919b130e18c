"""Every option of the LoRA kind in a real training: what was planned, what was trained, and what is merged are one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from coldpress.artifacts.base import Artifact
from coldpress.errors import PlanError
from coldpress.passes.adapter_settings import trained_parameters
from coldpress.passes.base import Context, PlanContext
from coldpress.passes.lora import DoRA, DoRAConfig, LoRA, LoRAConfig
from coldpress.passes.merge_adapter_weights import MergeAdapterWeights, MergeAdapterWeightsConfig
from fakes.tiny_models import make_checkpoint
from oracles.trained import logits_of_adapter, logits_of_checkpoint, train_with

ARGUMENTS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "seed": 1, "report_to": "none"}
EXACT = 2e-4
"""Between logits of order 10 that the same float32 numbers give, summed in another order."""


def options(**values: Any) -> dict[str, Any]:
    given = {"train_data_config": "lines", "r": 4, "alpha": 8, "lora_dropout": 0.0, "torch_dtype": "float32"}
    return {**given, "training_args": ARGUMENTS, "target_modules": "all-linear", **values}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "plain": make_checkpoint(folder / "plain", family="llama", dtype="float32"),
        "biases": make_checkpoint(folder / "biases", family="llama", dtype="float32", attention_bias=True),
        "tied": make_checkpoint(folder / "tied", family="llama", dtype="float32", tie_word_embeddings=True),
    }


# name -> (base, options). The start of the training is the base itself unless noted in MOVED.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "dora": ("plain", {"use_dora": True}),
    "rslora": ("plain", {"use_rslora": True}),
    "dora and rslora": ("plain", {"use_dora": True, "use_rslora": True}),
    "gaussian": ("plain", {"init_lora_weights": "gaussian"}),
    "at random": ("plain", {"init_lora_weights": False}),
    "pissa": ("plain", {"init_lora_weights": "pissa"}),
    "pissa, fast": ("plain", {"init_lora_weights": "pissa_niter_4"}),
    "pissa and rslora": ("plain", {"init_lora_weights": "pissa", "use_rslora": True}),
    "pissa and dora": ("plain", {"init_lora_weights": "pissa", "use_dora": True}),
    "pissa with patterns": (
        "plain",
        {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2, "0.mlp.up_proj": 7},
         "alpha_pattern": {"layers.1.*": 3.5}, "modules_to_save": ("norm",)},
    ),
    "olora": ("plain", {"init_lora_weights": "olora"}),
    "patterns": ("plain", {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.1.self_attn.o_proj": 32}}),
    "patterns that overlap": ("plain", {"rank_pattern": {"layers.1.*": 2, ".*_proj": 9, "down_proj": 5}}),
    "one layer": ("plain", {"layers_to_transform": 1}),
    "layers of a list": ("plain", {"layers_to_transform": (0,), "layers_pattern": "layers"}),
    "excluded": ("plain", {"exclude_modules": ("gate_proj", "layers.0.mlp.up_proj")}),
    "excluded by pattern": ("plain", {"exclude_modules": r".*\.mlp\..*"}),
    "whole head": ("plain", {"modules_to_save": ("lm_head",), "target_modules": ("q_proj",)}),
    "whole norm": ("plain", {"modules_to_save": ("norm", "layers.0.input_layernorm"), "target_modules": ("q_proj",)}),
    "whole embedding, tied": ("tied", {"modules_to_save": ("embed_tokens",), "target_modules": ("q_proj",)}),
    "all biases": ("biases", {"bias": "all", "target_modules": ("q_proj",)}),
    "own biases": ("biases", {"bias": "lora_only", "target_modules": ("q_proj", "up_proj")}),
}  # fmt: skip
MOVED = ("at random",)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_trained_the_saved_and_the_merged_model_are_one(
    name: str,
    bases: dict[str, Path],
    context: Callable[[str], Context],
    plan_context: PlanContext,
) -> None:
    base, values = OPTIONS[name]
    model, config = Artifact.load(bases[base]), LoRAConfig(**options(**values))
    got = train_with(LoRA(), config, model, context("lora"), plan_context)
    assert got.planned.spec.mismatch(got.artifact.describe()) is None
    assert got.parameters == trained_parameters(LoRA().adaptation(config, model.describe()), model.describe())
    before = logits_of_checkpoint(bases[base])
    if name not in MOVED:
        np.testing.assert_allclose(got.untrained, before, atol=EXACT)
    assert np.abs(got.logits - before).max() > 100 * EXACT, "it was trained"
    assert got.artifact.adapter is not None
    np.testing.assert_allclose(logits_of_adapter(bases[base], got.artifact.adapter), got.logits, atol=EXACT)
    merged = MergeAdapterWeights().run(MergeAdapterWeightsConfig(), got.artifact, context("merge"))
    np.testing.assert_allclose(logits_of_checkpoint(merged.path), got.logits, atol=EXACT)


def test_the_pass_dora_is_lora_with_magnitudes(
    bases: dict[str, Path], context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    model = Artifact.load(bases["plain"])
    by_pass = train_with(DoRA(), DoRAConfig(**options()), model, context("dora"), plan_context)
    by_option = train_with(LoRA(), LoRAConfig(**options(use_dora=True)), model, context("lora"), plan_context)
    np.testing.assert_array_equal(by_pass.logits, by_option.logits)
    assert by_pass.planned.spec == by_option.planned.spec
    assert by_pass.planned.spec.adapter is not None
    assert by_pass.planned.spec.adapter.kind == "DoRA"


def test_the_record_says_what_was_trained(
    bases: dict[str, Path], context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    config = LoRAConfig(**options(layers_to_transform=(1,), modules_to_save=("norm",)))
    got = train_with(LoRA(), config, Artifact.load(bases["plain"]), context("lora"), plan_context)
    assert got.artifact.adapter is not None
    record = json.loads((got.artifact.adapter / "training.json").read_text())
    assert record["method"] == "LoRA"
    assert record["arguments"]["learning_rate"] == 2e-2
    assert record["trained"]["parameters"] == got.parameters
    assert (record["trained"]["layers"], record["trained"]["layers_changed"]) == (8, 8), "7 linear layers and the norm"
    assert record["trained"]["of"] == got.parameters + sum(
        tensor.nbytes // 4 for tensor in got.artifact.describe().tensors
    )


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ("q_prj",)}, r"target_modules names .*q_prj \(did you mean q_proj\?\)"),
    ({"exclude_modules": ("q_prj",)}, r"exclude_modules names .*q_prj \(did you mean q_proj\?\)"),
    ({"exclude_modules": r".*experts.*"}, "exclude_modules '.*experts.*', read as a regular expression, matches no"),
    ({"exclude_modules": r".*proj"}, "exclude_modules leaves nothing of target_modules"),
    ({"layers_to_transform": 2}, "layers_to_transform names 2; the model has layers 0 to 1"),
    ({"layers_to_transform": (0, 5, -1)}, "layers_to_transform names -1, 5; the model has layers 0 to 1"),
    ({"layers_to_transform": ()}, "layers_to_transform is empty"),
    ({"layers_to_transform": 0, "target_modules": r".*\.1\..*"}, "have no layer in common: .* in the layers 1"),
    ({"layers_to_transform": 0, "layers_pattern": "layer"}, r"layers_pattern names .*layer \(did you mean layers\?\)"),
    ({"layers_pattern": "layers"}, "layers_to_transform counts, and that is not given"),
    (
        {"rank_pattern": {"q_prj": 2}},
        r"rank_pattern names .* not adapted: q_prj \(did you mean q_proj\?\)",
    ),
    ({"alpha_pattern": {"layers.7.*": 2}}, r"alpha_pattern names layers that are not adapted: layers.7.*"),
    ({"alpha_pattern": {"(": 2}}, r"alpha_pattern: '\(' is not a regular expression"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must give numbers above 0, got .*q_proj: 0"),
    ({"modules_to_save": ("norms",)}, r"modules_to_save names .*norms \(did you mean norm\?\)"),
    ({"modules_to_save": ("q_proj",)}, r"q_proj, .* would be adapted and trained whole"),
    ({"init_lora_weights": "pissa", "r": 65}, r"rank 65 is beyond \S+ of shape \[\d+, \d+\], which has 64 singular"),
    ({"bias": "all"}, "bias all trains nothing: the model has no biases"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_matches_nothing_is_refused_in_the_plan(
    values: dict[str, Any], said: str, bases: dict[str, Path], plan_context: PlanContext
) -> None:
    with pytest.raises(PlanError, match=said):
        LoRA().plan(LoRAConfig(**options(**values)), Artifact.load(bases["plain"]).describe(), plan_context)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"modules_to_save": ("lm_head",)}, "modules_to_save names"),  # the checkpoint has no such tensor
        ({"target_modules": ("embed_tokens",)}, "target_modules names"),
    ],
)
def test_a_tied_head_stays_tied(
    values: dict[str, Any], said: str, bases: dict[str, Path], plan_context: PlanContext
) -> None:
    with pytest.raises(PlanError, match=said):
        LoRA().plan(LoRAConfig(**options(**values)), Artifact.load(bases["tied"]).describe(), plan_context)


def test_a_tied_head_that_is_stored_twice(bases: dict[str, Path], plan_context: PlanContext) -> None:
    spec = Artifact.load(bases["plain"]).describe()
    tied = dataclasses.replace(spec, config={**spec.config, "tie_word_embeddings": True})
    for values in ({"modules_to_save": ("lm_head",)}, {"target_modules": ("lm_head", "q_proj")}):
        with pytest.raises(PlanError, match="lm_head is tied: the model uses one matrix as embedding and head"):
            LoRA().plan(LoRAConfig(**options(**values)), tied, plan_context)


@pytest.mark.parametrize(
    ("start", "said"),
    [("pisa", "did you mean pissa"), ("pissa_niter_0", "no initialisation"), ("eva", "known: true, false, gaussian")],
)
def test_an_unknown_start(start: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LoRAConfig(**options(init_lora_weights=start))
