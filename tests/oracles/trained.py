"""A training pass run for real, and the logits of what it trained, as it lay in memory when the training ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import coldpress.nn.train
from coldpress.artifacts.base import Artifact
from coldpress.passes.base import Context, PlanContext, Planned

__all__ = ["IDS", "Trained", "logits_of_adapter", "logits_of_checkpoint", "train_with"]

IDS = [[1, 72, 101, 108, 108, 111, 32, 45, 62, 32, 106, 111, 121], [1, 112, 104, 114, 97, 115, 101, 32, 51, 7, 9, 2, 5]]


@dataclass(frozen=True)
class Trained:
    """A pass's result beside the model that it trained."""

    planned: Planned
    artifact: Artifact
    logits: np.ndarray
    """Of the trained model itself on `IDS`."""
    untrained: np.ndarray
    """Of the same model before the first step."""
    parameters: int
    """Numbers that required gradients."""


def train_with(
    made: Any,
    config: Any,
    model: Artifact,
    context: Context,
    planning: PlanContext,
) -> Trained:
    """Plan and run."""
    planned = made.plan(config, model.describe(), planning)
    with _watched() as seen:
        artifact = made.run(config, model, context)
    return Trained(planned, artifact, seen["logits"], seen["untrained"], seen["parameters"])


@contextmanager
def _watched() -> Iterator[dict[str, Any]]:
    seen: dict[str, Any] = {}
    whole = coldpress.nn.train.train

    def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
        seen["parameters"] = sum(one.numel() for one in model.parameters() if one.requires_grad)
        seen["untrained"] = _logits(model)
        report = whole(model, *args, **kwargs)
        seen["logits"] = _logits(model)
        return report

    coldpress.nn.train.train = watched
    try:
        yield seen
    finally:
        coldpress.nn.train.train = whole


def _logits(model: Any) -> np.ndarray:
    import torch

    was = model.training
    model.eval()
    mixed = any(one.dtype == torch.bfloat16 for one in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = model(input_ids=torch.tensor(IDS)).logits.float().numpy()
    model.train(was)
    return np.asarray(found)


def logits_of_adapter(base: Path, adapter: Path) -> np.ndarray:
    """Of the base as it lies on disk with the adapter, both loaded by their own libraries in float32."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return _logits(peft.PeftModel.from_pretrained(model, adapter))


def logits_of_checkpoint(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    return _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
