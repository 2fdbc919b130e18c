"""Running a pass in a test without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coldpress.artifacts.base import Artifact
from coldpress.config.schema import Accelerator
from coldpress.hardware import detect
from coldpress.passes.base import Context, PlanContext, Planned
from coldpress.passes.model_builder import ModelBuilder, ModelBuilderConfig

__all__ = ["CPU", "CUDA", "TOKENIZER", "build_with_pass", "plan_with_pass"]

TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "merges": []},
}  # fmt: skip
"""tokenizer.json of three tokens: what a build copies, where no text is read."""

CPU = Accelerator()
CUDA = Accelerator(device="gpu", execution_providers=("CUDAExecutionProvider",))


def plan_with_pass(source: Path, accelerator: Accelerator = CPU, **options: Any) -> Planned:
    env = PlanContext(detect(), accelerator, {}, {})
    return ModelBuilder().plan(ModelBuilderConfig(**options), Artifact.load(source).describe(), env)


def build_with_pass(source: Path, output: Path, accelerator: Accelerator = CPU, **options: Any) -> Artifact:
    """Plan, run, and hold the one against the other."""
    planned = plan_with_pass(source, accelerator, **options)
    output.mkdir(parents=True, exist_ok=True)
    context = Context("build", output, output, detect(), accelerator, {}, lambda event: None)
    built = ModelBuilder().run(ModelBuilderConfig(**options), Artifact.load(source), context)
    assert planned.spec.mismatch(built.describe()) is None
    size = sum(file.stat().st_size for file in output.iterdir() if file.name.startswith("model.onnx"))
    assert 0.5 * size < planned.estimate.disk < size + (2 << 20)
    return built
