"""What a plan says of a training that several processes do, and what each of them then holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coldpress.artifacts.base import Artifact
from coldpress.errors import PlanError
from coldpress.passes.base import PlanContext, Planned
from coldpress.passes.full_finetune import FullFinetune
from coldpress.passes.lora import LoRA
from coldpress.passes.quantized_lora import QLoRA


def planned(made: Any, model: Path, env: PlanContext, **arguments: Any) -> Planned:
    config = made.Config(
        train_data_config="lines",
        torch_dtype="float32",
        training_args={"per_device_train_batch_size": 2, "max_steps": 100, "max_grad_norm": 1.0, **arguments},
    )
    found: Planned = made.plan(config, Artifact.load(model).describe(), env)
    return found


def test_rows_and_time_of_several_processes(tiny_phi3: Path, plan_context: PlanContext) -> None:
    plan_context = replace(plan_context, data_bytes=dict.fromkeys(plan_context.data_bytes, 10**9))
    one = planned(LoRA(), tiny_phi3, plan_context)
    together = planned(LoRA(), tiny_phi3, replace(plan_context, ranks=4, neighbours=2))
    assert not any("rows of a step" in note for note in one.notes)
    assert "rows of a step: 4 processes x 2 = 8 (DDP: each holds the whole model)" in together.notes
    # Each holds as much as one; steps have four times the rows, on twice the processors.
    assert together.estimate.ram == one.estimate.ram
    assert together.estimate.seconds - 5 == pytest.approx(2 * (one.estimate.seconds - 5))


def test_fsdp_divides_what_is_trained(tiny_phi3: Path, plan_context: PlanContext) -> None:
    env = replace(plan_context, ranks=2, neighbours=2)
    whole, sharded = (planned(FullFinetune(), tiny_phi3, env, **fsdp).estimate.ram for fsdp in ({}, {"fsdp": True}))
    parameters = Artifact.load(tiny_phi3).describe().parameters
    # 16 bytes a number, half of them on each; and two of two blocks gathered, 4 bytes a number.
    assert whole - sharded == pytest.approx(16 * parameters / 2 - 2 * 4 * parameters / 2, rel=0.01)


def test_fsdp_that_cannot_work(tiny_phi3: Path, plan_context: PlanContext) -> None:
    with pytest.raises(PlanError, match="there is one"):
        planned(LoRA(), tiny_phi3, plan_context, fsdp=True)
    pytest.importorskip("bitsandbytes")
    with pytest.raises(PlanError, match="FSDP does not divide 4-bit weights"):
        planned(QLoRA(), tiny_phi3, replace(plan_context, ranks=2), fsdp=True)
