"""What there is to say before a training that several processes run: rows of a step, and FSDP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldpress.errors import PlanError
from coldpress.passes.base import PlanContext

__all__ = ["ranks_note", "refuse_sharding"]


def ranks_note(arguments: Mapping[str, Any], env: PlanContext) -> str:
    """Rows of a step are those of one process, times their number: a step of the same config is a larger one."""
    rows = int(arguments.get("per_device_train_batch_size") or 8)
    rows *= int(arguments.get("gradient_accumulation_steps") or 1)
    how = "FSDP: each holds a part of the weights" if arguments.get("fsdp") else "DDP: each holds the whole model"
    return f"rows of a step: {env.ranks} processes x {rows} = {env.ranks * rows} ({how})"


def refuse_sharding(arguments: Mapping[str, Any], env: PlanContext) -> None:
    """Raise PlanError for FSDP without processes to divide a model among."""
    if arguments.get("fsdp") and env.ranks == 1:
        raise PlanError(
            "training_args.fsdp divides a model among processes, and there is one",
            hint="give the system several accelerators or a hosts file, or leave fsdp out",
        )
