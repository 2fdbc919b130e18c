"""Models of other forms, made from a checkpoint by the real builder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coldpress.artifacts.base import Artifact
from coldpress.config.schema import Accelerator
from coldpress.hardware import detect
from coldpress.passes.base import Context
from coldpress.passes.model_builder import ModelBuilder

__all__ = ["build_fp32", "build_onnx"]


def build_onnx(source: Path, target: Path, **config: Any) -> Artifact:
    """An ONNX model in `target`/out."""
    (target / "out").mkdir(parents=True)
    context = Context("build", target / "out", target, detect(), Accelerator(), {}, lambda event: None)
    made = ModelBuilder()
    return made.run(made.Config(**config), Artifact.load(source), context)


def build_fp32(source: Path, target: Path) -> Artifact:
    return build_onnx(source, target, precision="fp32")
