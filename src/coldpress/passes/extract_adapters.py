"""ExtractAdapters: the adapter of a graph with LoRA inputs, as a file that ONNX Runtime loads.

Runs after ModelBuilder with `adapter: inputs`, which leaves the weights of the base as they are. The model's files are
handed on (large ones by hard link), the adapter's is put beside them. Options are those of Olive's pass of this name.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import ClassVar, Literal

from coldpress.artifacts.adapter import AdapterWeights
from coldpress.artifacts.adapter_inputs import (
    ADAPTER_FILE,
    Format,
    check_inputs,
    copy_adapter,
    lora_inputs,
    outlines,
    write_inputs,
)
from coldpress.artifacts.base import Artifact, Spec
from coldpress.config.schema import Frozen
from coldpress.errors import PlanError
from coldpress.events import Message
from coldpress.passes.base import Context, Estimate, Limits, PlanContext, Planned

__all__ = ["ExtractAdapters", "ExtractAdaptersConfig"]

STEP_FILES = ("artifact.json", "record.json")
"""Of the step that made the model, not of the model."""
LINK_BYTES = 1 << 20
"""Larger files are linked, not copied: they are weights, which nobody edits."""


class ExtractAdaptersConfig(Frozen):
    """Parameters of ExtractAdapters."""

    adapter_type: Literal["lora", "dora", "loha"] = "lora"
    """Kind of adapter: LoRA can be an input of a graph; the others are merged."""
    make_inputs: bool = True
    """The adapter's weights are inputs of the graph. Always so."""
    dynamic_lora_r: bool = True
    """Adapters of any rank fit the graph. Always so."""
    optional_inputs: bool = True
    """Without an adapter the graph is the base model. Always so."""
    save_format: Format = "onnx_adapter"
    """onnx_adapter is what ONNX Runtime and GenAI load; safetensors and numpy (.npz) hold the same inputs by name."""


class ExtractAdapters:
    """Write the adapter of a model with LoRA inputs to a file that can be switched at run time."""

    Config: ClassVar[type[ExtractAdaptersConfig]] = ExtractAdaptersConfig
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx-ir", "numpy")
    preload: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx_ir")
    needs_torch: ClassVar[bool] = False
    takes: ClassVar[str] = "onnx"

    @staticmethod
    def check(config: ExtractAdaptersConfig) -> None:
        """Raise PlanError for what is not built, whatever the model is."""
        _raise(_not_built(config))

    def plan(self, config: ExtractAdaptersConfig, spec: Spec, env: PlanContext) -> Planned:
        problems = _not_built(config)
        if spec.kind != "onnx":
            problems.append("it takes an ONNX model; put ModelBuilder with adapter: inputs before it")
        elif spec.adapter is None:
            problems.append(
                "the model has no LoRA inputs; say adapter: inputs in ModelBuilder, and give it a model with an adapter"
            )
        _raise(problems)
        return Planned(spec, Estimate(ram=300 << 20, disk=64 << 20, seconds=2.0))

    def limits(self, config: ExtractAdaptersConfig, spec: Spec) -> Limits | None:
        """The same numbers go in by another door."""
        return Limits(kl=1e-6, perplexity_increase=1e-6)

    def run(self, config: ExtractAdaptersConfig, model: Artifact, ctx: Context) -> Artifact:
        from coldpress.graph.lora import inputs_of

        if model.adapter is None:
            raise PlanError("the model has no LoRA inputs")
        wanted = inputs_of(model.model)
        with AdapterWeights.open(model.adapter) as adapter:
            dtype = next((dtype for dtype, _ in wanted.values()), "float32")
            inputs = lora_inputs(adapter, dtype)
        check_inputs(outlines(inputs), wanted, str(model.model))
        for source in sorted(model.model.iterdir()):
            if source.is_file() and source.name not in STEP_FILES:
                _link_or_copy(source, ctx.output / source.name)
        copy_adapter(model.adapter, ctx.output / "adapter")
        file = write_inputs(ctx.output / ADAPTER_FILE, inputs, config.save_format)
        text = f"{len(inputs) // 2} modules, {file.stat().st_size / 1e6:.1f} MB, {dtype}: {file.name}"
        ctx.emit(Message("info", text, ctx.step))
        return Artifact(
            path=ctx.output,
            kind="onnx",
            model=ctx.output,
            adapter=ctx.output / "adapter",
            precision=model.precision,
            execution_provider=model.execution_provider,
        )


def _link_or_copy(source: Path, place: Path) -> None:
    if source.stat().st_size > LINK_BYTES:
        try:
            os.link(source, place)
            return
        except OSError:  # another disk, or one without hard links
            pass
    shutil.copy2(source, place)


def _not_built(config: ExtractAdaptersConfig) -> list[str]:
    problems = [
        f"{name}: false is not built; adapters are inputs of any rank, and without one the graph is the base model"
        for name in ("make_inputs", "dynamic_lora_r", "optional_inputs")
        if not getattr(config, name)
    ]
    if config.adapter_type != "lora":
        problems.append(f"adapter_type {config.adapter_type} cannot be an input of a graph; merge it instead")
    return problems


def _raise(problems: list[str]) -> None:
    if problems:
        raise PlanError("ExtractAdapters: " + "\n  ".join(problems))
