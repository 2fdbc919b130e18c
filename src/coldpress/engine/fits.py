"""Whether a machine has room for a plan: memory and disk, and folders that can be written and hold nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from coldpress.data.sources import files_of
from coldpress.errors import DataError
from coldpress.hardware import Hardware
from coldpress.units import parse_size, size

if TYPE_CHECKING:
    from coldpress.engine.plan import Plan

__all__ = ["Refuse", "fits"]

Refuse = Callable[[str, str, str | None], None]
"""Takes a message, the place in the config, a hint."""


def fits(plan: Plan, hardware: Hardware, refuse: Refuse) -> list[str]:
    """Refuse what the machine has no room for; returns notes on what it may lack when the run begins."""
    notes = []
    memory, whose = hardware.memory, "this machine has"
    allowed = plan.accelerator.memory if plan.accelerator.device == "cpu" else None
    if allowed is not None and parse_size(allowed) < memory:
        memory, whose = parse_size(allowed), "the config allows"
    for step in plan.steps:
        if step.estimate is None:
            continue
        if step.estimate.ram > memory:
            refuse(
                f"needs about {size(step.estimate.ram)} of memory, and {whose} {size(memory)}",
                f"passes.{step.name}",
                "use a smaller batch, a shorter max_seq_len or gradient_checkpointing",
            )
        elif step.estimate.ram > hardware.available:
            notes.append(
                f"{step.name} needs about {size(step.estimate.ram)} of memory; {size(hardware.available)} are free now"
            )
    for key, folder in (("cache_dir", plan.store.root), ("output_dir", plan.output_dir)):
        _can_write(key, folder, refuse)
        _apart(key, folder, plan, refuse)
    _overlaps(plan, refuse)
    existing = next(path for path in (plan.store.root, *plan.store.root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if plan.estimate.disk > free:
        refuse(
            f"needs about {size(plan.estimate.disk)} of disk, and {size(free)} are free on {existing}",
            "cache_dir",
            "free some space (`coldpress cache prune`) or set cache_dir elsewhere",
        )
    return notes


def _can_write(key: str, folder: Path, refuse: Refuse) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        refuse(f"{existing} is a file, so {folder} cannot be a folder", key, "give another folder")
    elif not os.access(existing, os.W_OK):
        refuse(f"{existing} cannot be written", key, "give it write permission, or give another folder")


def _apart(key: str, folder: Path, plan: Plan, refuse: Refuse) -> None:
    """What is made does not go among the files of the input model."""
    artifact = plan.model.artifact
    for model in () if artifact is None else (artifact.path, artifact.model, artifact.adapter):
        if model is not None and folder.resolve().is_relative_to(model.resolve()):
            what = (
                "is the input model's folder" if folder.resolve() == model.resolve() else f"lies in {model}, an input"
            )
            refuse(f"{folder} {what}, where nothing may be written", key, f"give another {key}")
            return


def _overlaps(plan: Plan, refuse: Refuse) -> None:
    """The model goes to output_dir/model, which is replaced as a whole: nothing of the user's may lie there."""
    target = plan.output_dir / "model"
    if target.is_dir() and any(target.iterdir()) and not (target / "artifact.json").is_file():
        refuse(
            f"{target} holds something that Coldpress did not write, and the model would replace it",
            "output_dir",
            "move it away, or give another output_dir",
        )
        return
    artifact = plan.model.artifact
    inputs = [] if artifact is None else [artifact.path, artifact.model, artifact.adapter]
    for config in plan.data_configs.values():
        with contextlib.suppress(DataError):  # refused already
            inputs += files_of(config).values()
    for place in inputs:
        if place is not None and place.resolve().is_relative_to(target):
            refuse(
                f"{place} is an input, and {target} is where the result replaces what is there",
                "output_dir",
                "give another output_dir",
            )
            return
