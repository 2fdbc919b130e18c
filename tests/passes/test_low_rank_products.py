"""LoHa and LoKr in real trainings: what was planned, trained, proved against and merged are one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from coldpress.artifacts.adapter import AdapterWeights
from coldpress.artifacts.adapter_inputs import lora_inputs
from coldpress.artifacts.base import Artifact
from coldpress.errors import PlanError
from coldpress.evaluate.runners import LayerwiseRunner, open_runner
from coldpress.passes.adapter_settings import trained_parameters
from coldpress.passes.base import Context, PlanContext
from coldpress.passes.low_rank_products import LoHa, LoHaConfig, LoKr, LoKrConfig
from coldpress.passes.merge_adapter_weights import MergeAdapterWeights, MergeAdapterWeightsConfig
from coldpress.passes.model_builder import ModelBuilder, ModelBuilderConfig
from fakes.tiny_models import make_checkpoint
from oracles.trained import IDS, logits_of_adapter, logits_of_checkpoint, train_with

ARGUMENTS = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 5e-2, "seed": 1, "report_to": "none"}
EXACT = 2e-4
"""Between logits of order 10 that the same float32 numbers give, summed in another order."""


def options(**values: Any) -> dict[str, Any]:
    given = {"train_data_config": "lines", "r": 4, "alpha": 16, "torch_dtype": "float32"}
    return {**given, "training_args": ARGUMENTS, "target_modules": "all-linear", **values}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), family="llama", dtype="float32", num_key_value_heads=1)


OPTIONS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "loha": (LoHa, LoHaConfig, {}),
    "loha, patterns, a whole norm": (
        LoHa,
        LoHaConfig,
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.mlp.*": 3.5}, "modules_to_save": ("norm",)},
    ),
    "loha, dropouts, one layer": (
        LoHa,
        LoHaConfig,
        {"rank_dropout": 0.2, "module_dropout": 0.3, "layers_to_transform": 1, "exclude_modules": ("up_proj",)},
    ),
    "loha at random": (LoHa, LoHaConfig, {"init_weights": False}),
    "lokr": (LoKr, LoKrConfig, {}),
    "lokr in parts": (LoKr, LoKrConfig, {"r": 2}),
    "lokr, both in parts": (LoKr, LoKrConfig, {"r": 2, "decompose_both": True}),
    "lokr, factor 4": (LoKr, LoKrConfig, {"decompose_factor": 4, "init_weights": "lycoris"}),
    "lokr, factor 7": (LoKr, LoKrConfig, {"decompose_factor": 7, "decompose_both": True, "r": 1}),
    "lokr, patterns, dropouts": (
        LoKr,
        LoKrConfig,
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"o_proj": 2.5}, "rank_dropout": 0.2,
         "rank_dropout_scale": True, "module_dropout": 0.2, "modules_to_save": ("lm_head",)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_the_trained_the_saved_the_proved_and_the_merged_model_are_one(
    name: str, base: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    made, config_type, values = OPTIONS[name]
    model, config = Artifact.load(base), config_type(**options(**values))
    got = train_with(made(), config, model, context("train"), plan_context)
    assert got.planned.spec.mismatch(got.artifact.describe()) is None
    assert got.parameters == trained_parameters(made().adaptation(config, model.describe()), model.describe())
    before = logits_of_checkpoint(base)
    if values.get("init_weights", True):
        np.testing.assert_allclose(got.untrained, before, atol=EXACT)
    assert np.abs(got.logits - before).max() > 100 * EXACT, "it was trained"
    assert got.artifact.adapter is not None
    np.testing.assert_allclose(logits_of_adapter(base, got.artifact.adapter), got.logits, atol=EXACT)
    with open_runner(got.artifact, blocks="always") as reference:
        assert isinstance(reference, LayerwiseRunner)
        np.testing.assert_allclose(np.stack(reference.logits(IDS)), got.logits, atol=EXACT)
    merged = MergeAdapterWeights().run(MergeAdapterWeightsConfig(), got.artifact, context("merge"))
    np.testing.assert_allclose(logits_of_checkpoint(merged.path), got.logits, atol=EXACT)


@pytest.mark.parametrize("kind", [(LoHa, LoHaConfig), (LoKr, LoKrConfig)], ids=["LoHa", "LoKr"])
def test_in_bfloat16_and_through_the_builder(
    kind: tuple[Any, Any], tiny_phi3: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    """The builder adds the adapter while it streams: its graph is the merged checkpoint's."""
    made, config_type = kind
    config = config_type(**options(torch_dtype="bfloat16", r=3))
    got = train_with(made(), config, Artifact.load(tiny_phi3), context("train"), plan_context)
    assert got.artifact.adapter is not None
    builder = ModelBuilderConfig(precision="fp32")
    graph = ModelBuilder().run(builder, got.artifact, context("build"))
    with open_runner(graph) as built, open_runner(got.artifact, blocks="always") as reference:
        for found, expected in zip(built.logits(IDS), reference.logits(IDS), strict=True):
            np.testing.assert_allclose(found, expected, atol=5e-4)
    inputs = ModelBuilderConfig(precision="fp32", adapter="inputs")
    with pytest.raises(PlanError, match=f"more than LoRA on linear layers: {made.__name__}"):
        ModelBuilder().plan(inputs, got.planned.spec, plan_context)
    with AdapterWeights.open(got.artifact.adapter) as weights, pytest.raises(PlanError, match="LoHa or LoKr: 8"):
        lora_inputs(weights)


def test_options_of_another_method_are_unknown() -> None:
    for config_type, key in ((LoHaConfig, "decompose_both"), (LoHaConfig, "use_dora"), (LoKrConfig, "lora_dropout")):
        with pytest.raises(ValidationError, match=key):
            config_type(train_data_config="lines", **{key: True})
    with pytest.raises(ValidationError, match="must be -1, or 1 and more"):
        LoKrConfig(train_data_config="lines", decompose_factor=0)


def test_a_tied_embedding_is_lora_alone(tmp_path: Path, plan_context: PlanContext) -> None:
    tied = make_checkpoint(tmp_path / "tied", family="llama", tie_word_embeddings=True)
    with pytest.raises(PlanError, match="one matrix as embedding and head, and PEFT keeps them together under LoRA"):
        LoHa().plan(
            LoHaConfig(**options(modules_to_save=("embed_tokens",))), Artifact.load(tied).describe(), plan_context
        )
