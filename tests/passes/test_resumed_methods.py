"""A training of any method that goes on from its checkpoint ends where one that was never stopped does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.base import Artifact
from coldpress.passes.base import Context, PlanContext
from coldpress.registry import PASSES
from fakes.tiny_models import make_checkpoint
from oracles.trained import train_with

ARGUMENTS = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "seed": 1,
    "report_to": "none", "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {
        "r": 4,
        "init_lora_weights": "pissa_niter_2",
        "modules_to_save": ("norm",),
        "target_modules": "all-linear",
    },
    "DoRA": {"r": 4, "target_modules": "all-linear"},
    "LoHa": {"r": 4, "target_modules": "all-linear"},
    "LoKr": {"r": 4, "target_modules": "all-linear"},
    "LoftQ": {"r": 4, "lora_dropout": 0.1, "loftq_iter": 2},
    "FullFinetune": {"trainable_modules": ("layers.1", "norm")},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), family="llama", dtype="float32")


@pytest.mark.parametrize("name", METHODS)
def test_resumed_equals_uninterrupted(
    name: str, base: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    if name == "LoftQ":
        pytest.importorskip("bitsandbytes")
    made, model = PASSES[name](), Artifact.load(base)

    def config(steps: int) -> Any:
        arguments = {**ARGUMENTS, "max_steps": steps}
        given = {"train_data_config": "lines", "torch_dtype": "float32", "training_args": arguments, **METHODS[name]}
        return made.Config(**given)

    through = train_with(made, config(4), model, context("through"), plan_context)
    first = context("first")
    half = train_with(made, config(2), model, first, plan_context)
    second = dataclasses.replace(context("second"), work=first.work)
    rest = train_with(made, config(4), model, second, plan_context)
    place = rest.artifact.adapter or rest.artifact.path
    assert json.loads((place / "training.json").read_text())["resumed_from"] == 2
    assert np.abs(half.logits - through.logits).max() > 1e-3
    np.testing.assert_allclose(rest.logits, through.logits, atol=1e-4)
