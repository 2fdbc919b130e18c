"""Adapters on a base in 4 bits: the merged model is the one that was trained, whatever the adapter's options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.base import Artifact
from coldpress.errors import PlanError
from coldpress.evaluate.runners import open_runner
from coldpress.passes.base import Context, PlanContext
from coldpress.passes.merge_adapter_weights import MergeAdapterWeights, MergeAdapterWeightsConfig
from coldpress.passes.quantized_lora import QLoRA, QLoRAConfig
from fakes.tiny_models import make_checkpoint
from oracles.trained import IDS, Trained, logits_of_checkpoint, train_with

pytest.importorskip("bitsandbytes")

ARGUMENTS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "seed": 1, "report_to": "none"}
EXACT = 2e-4
"""Between logits of order 10 that the same float32 numbers give, summed in another order."""


def options(**values: Any) -> dict[str, Any]:
    given = {"train_data_config": "lines", "r": 4, "alpha": 8, "lora_dropout": 0.0, "torch_dtype": "float32"}
    return {**given, "training_args": ARGUMENTS, "target_modules": "all-linear", **values}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), family="llama", dtype="float32")


def hold_together(got: Trained, base: Path, context: Callable[[str], Context]) -> None:
    """Trained in memory, described by the proof's reference, and merged: one model, which is not the 16-bit one."""
    assert got.planned.spec.mismatch(got.artifact.describe()) is None
    assert np.abs(got.untrained - logits_of_checkpoint(base)).max() > 100 * EXACT, "4 bits are seen"
    with open_runner(got.artifact, blocks="always") as reference:
        np.testing.assert_allclose(np.stack(reference.logits(IDS)), got.logits, atol=EXACT)
    merged = MergeAdapterWeights().run(MergeAdapterWeightsConfig(), got.artifact, context("merge"))
    np.testing.assert_allclose(logits_of_checkpoint(merged.path), got.logits, atol=EXACT)


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"use_dora": True, "double_quant": True, "use_rslora": True},
        {"use_rslora": True, "quant_type": "fp4"},
        {"init_lora_weights": "gaussian", "rank_pattern": {"q_proj": 2}, "modules_to_save": ("norm",)},
        {"layers_to_transform": 1, "double_quant": True},
    ],
    ids=str,
)
def test_qlora_with_options(
    values: dict[str, Any], base: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    config = QLoRAConfig(**options(**values))
    hold_together(train_with(QLoRA(), config, Artifact.load(base), context("qlora"), plan_context), base, context)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused(start: str, base: Path, plan_context: PlanContext) -> None:
    with pytest.raises(PlanError, match=rf"{start} takes a part out of the base's weights"):
        QLoRA().plan(QLoRAConfig(**options(init_lora_weights=start)), Artifact.load(base).describe(), plan_context)
