"""Add an adapter to its base model, tensor by tensor from file to file, without torch.

The sums are made in float32 (`artifacts/adapter.py` has the formulas) and rounded once to the checkpoint's type.

After QLoRA there are two bases to choose from. The adapter was trained on 4-bit weights and corrects their errors
too, so by default it is added to these: every linear layer goes through the same quantization again
(`kernels/nf4.py`) and comes back in the checkpoint's type. `base: original` adds it to the 16-bit weights instead: a
model that no training step has seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from coldpress.artifacts.adapter import AdapterWeights
from coldpress.artifacts.adapter_base import ClassifierBase
from coldpress.artifacts.adapter_inputs import copy_adapter, lora_inputs
from coldpress.artifacts.adapter_merged import MergedTensors
from coldpress.artifacts.base import Artifact, BaseQuantization, Spec, is_tied
from coldpress.artifacts.checkpoint_files import copy_configs
from coldpress.artifacts.classifiers import (
    CLASSIFICATION,
    classifier_config,
    classifier_layout,
    is_classifier,
    labels_of,
)
from coldpress.artifacts.quantized import open_checkpoint
from coldpress.artifacts.tensors import TensorInfo, TensorSource, numpy_dtype, write_safetensors
from coldpress.config.schema import Frozen
from coldpress.data.tokenizer import copy_tokenizer
from coldpress.errors import CheckpointError, PlanError
from coldpress.events import Message, Progress
from coldpress.nn.adapters import decoder_linears, four_bit_names
from coldpress.passes.base import Context, Estimate, Limits, PlanContext, Planned

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["MergeAdapterWeights", "MergeAdapterWeightsConfig", "keep_adapter", "open_merged", "with_adapter"]

ROWS_BYTES = 32 << 20
"""Bytes of float32 rows that are merged at a time."""

MERGE_LIMITS = Limits(kl=1e-3, perplexity_increase=0.005)
ORIGINAL_BASE_LIMITS = Limits(kl=0.1, perplexity_increase=0.05)
"""For a QLoRA adapter on the 16-bit weights: the reference has 4-bit weights, the result has not."""


class MergeAdapterWeightsConfig(Frozen):
    """Parameters of MergeAdapterWeights."""

    base: Literal["dequantized", "original"] | None = None
    """After QLoRA: merge into the 4-bit weights that were trained on (dequantized), or into the 16-bit ones
    (original); null is dequantized after QLoRA, and original after LoRA."""


class MergeAdapterWeights:
    """Add an adapter to its base model."""

    Config: ClassVar[type[MergeAdapterWeightsConfig]] = MergeAdapterWeightsConfig
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "ml_dtypes")
    preload: ClassVar[tuple[str, ...]] = ("numpy", "ml_dtypes")
    needs_torch: ClassVar[bool] = False
    takes: ClassVar[str] = "checkpoint"

    def plan(self, config: MergeAdapterWeightsConfig, spec: Spec, env: PlanContext) -> Planned:
        if spec.kind != "checkpoint":
            raise PlanError("an ONNX model has no adapter to merge", hint="put this step before the build")
        if spec.adapter is None:
            raise PlanError("the model has no adapter to merge", hint="train one first, or give adapter_path")
        if config.base == "dequantized" and spec.base_quantization is None:
            raise PlanError(
                "base: dequantized is for an adapter that was trained with QLoRA; this one was not",
                hint="leave base out",
            )
        if spec.task == CLASSIFICATION:
            spec = spec.as_classifier()
        planned = Spec(
            kind="checkpoint", config=spec.config, tensors=spec.tensors, precision=spec.precision, task=spec.task
        )
        largest = max((tensor.nbytes for tensor in spec.tensors), default=0)
        notes: tuple[str, ...] = ()
        if spec.base_quantization is not None:
            dequantized = config.base != "original"
            notes = (
                "the adapter is added to the 4-bit weights it was trained on, as 16-bit numbers"
                if dequantized
                else "the adapter is added to the original weights, not to the 4-bit ones it was trained on",
            )
        return Planned(
            planned,
            Estimate(
                ram=(60 << 20) + largest + 4 * ROWS_BYTES,
                disk=spec.bytes,
                seconds=1.0 + spec.bytes / 200e6 * (4 if spec.base_quantization else 1),
            ),
            notes,
        )

    def limits(self, config: MergeAdapterWeightsConfig, spec: Spec) -> Limits | None:
        if spec.base_quantization is not None and config.base == "original":
            return ORIGINAL_BASE_LIMITS
        return MERGE_LIMITS

    def run(self, config: MergeAdapterWeightsConfig, model: Artifact, ctx: Context) -> Artifact:
        if model.adapter is None:
            raise PlanError("the model has no adapter to merge")
        spec = model.describe()
        original = config.base == "original"
        with open_checkpoint(model.model, spec.config) as base, AdapterWeights.open(model.adapter) as adapter:
            source: TensorSource = base
            if spec.task == CLASSIFICATION:
                classifier = ClassifierBase(spec.config, spec.precision)
                source = classifier.tensors(base, adapter)
            merge = _Merge(source, open_merged(model, source, adapter, original=original), ctx)
            write_safetensors(ctx.output / "model.safetensors", merge.tensors(), {"format": "pt"})
            labels = adapter.rows_of(classifier_layout(spec.config).labels_name) if source is not base else None
        quantization = None if original else model.base_quantization
        _report(merge, len(decoder_linears(_layers(spec))), quantization, ctx)
        copy_configs(model.model, ctx.output)
        if labels is not None:
            _write_classes(ctx.output, spec.config, labels)
        copy_tokenizer(model.tokenizer_path, ctx.output)
        if model.tokenizer_path != model.model:
            copy_tokenizer(model.model, ctx.output)
        return Artifact(path=ctx.output, kind="checkpoint", model=ctx.output)


def open_merged(
    model: Artifact, base: TensorSource, adapter: AdapterWeights, *, original: bool = False, added: bool = True
) -> MergedTensors:
    """The base of `model` with its adapter added; after QLoRA on the 4-bit weights, unless `original`.

    Without `added`, the base alone as the adapter saw it. Raises CheckpointError for an adapter that does not fit.
    """
    spec = model.describe()
    quantization = None if original else model.base_quantization
    return MergedTensors(
        base,
        adapter,
        tied=is_tied(spec.config, spec.tensors) and spec.task != CLASSIFICATION,
        quantization=quantization,
        four_bits=() if quantization is None else four_bit_names(_layers(spec)),
        added=added,
    )


def _layers(spec: Spec) -> dict[str, tuple[int, int]]:
    """Linear layers by their names in the model that was trained."""
    return (spec.as_classifier() if spec.task == CLASSIFICATION else spec).linear_layers()


def _write_classes(folder: Path, config: Mapping[str, Any], labels: int) -> None:
    """Make config.json that of a classifier: the adapter's own, or one with numbered classes where it has none."""
    named = labels_of(config) if len(labels_of(config)) == labels else [f"LABEL_{index}" for index in range(labels)]
    made = dict(config) if is_classifier(config) else classifier_config(config, named)
    (folder / "config.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


@contextmanager
def with_adapter(model: Artifact, base: TensorSource, *, added: bool) -> Iterator[TensorSource]:
    """The weights of `model`, whose base is open, for a pass that streams them: see `open_merged`."""
    if model.adapter is None:
        yield base
        return
    with AdapterWeights.open(model.adapter) as adapter:
        merged = open_merged(model, base, adapter, added=added)
        yield merged if added or model.base_quantization is not None else base


def keep_adapter(model: Artifact, output: Path, modules: Collection[str]) -> Path | None:
    """Copy the adapter of `model` beside a graph with LoRA inputs for `modules`, if it has one and it fits."""
    if model.adapter is None:
        return None
    with AdapterWeights.open(model.adapter) as adapter:
        lora_inputs(adapter)  # refuses what is more than low-rank sums
        odd = {name.removesuffix(".weight").rpartition(".")[2] for name in adapter.pairs} - set(modules)
    if odd:
        raise CheckpointError(
            f"{model.adapter} changes {', '.join(sorted(odd))}, for which the graph has no inputs",
            hint="name them in adapter_modules as well",
        )
    return copy_adapter(model.adapter, output / "adapter")


@dataclass
class _Merge:
    """The tensors of the merged model, each made when it is written."""

    base: TensorSource
    merged: MergedTensors
    ctx: Context
    changed: list[str] = field(default_factory=list)

    def tensors(self) -> Iterator[tuple[TensorInfo, Callable[[], npt.NDArray[Any]]]]:
        infos = sorted(self.base.infos(), key=lambda info: info.name)
        for place, info in enumerate(infos, start=1):
            yield info, self._producer(info, place, len(infos))

    def _producer(self, info: TensorInfo, place: int, total: int) -> Callable[[], npt.NDArray[Any]]:
        def produce() -> npt.NDArray[Any]:
            tensor = self._rounded(info)
            self.ctx.emit(Progress(self.ctx.step, place, total, "tensors"))
            return tensor

        return produce

    def _rounded(self, info: TensorInfo) -> npt.NDArray[Any]:
        """The merged tensor in the checkpoint's type: rounded once."""
        import numpy as np

        if self.merged.info(info.name) == info or not info.shape:
            return self.merged.read(info.name)
        dtype = numpy_dtype(info.dtype)
        out = np.empty(info.shape, dtype)
        rows = max(1, ROWS_BYTES // (4 * math.prod(info.shape[1:])))
        differs = False
        for start in range(0, info.shape[0], rows):
            stop = min(start + rows, info.shape[0])
            before, after = self.merged.before_and_after(info.name, start, stop)
            out[start:stop] = after.astype(dtype)
            differs = differs or bool((out[start:stop] != before.astype(dtype)).any())
        if differs:
            self.changed.append(info.name)
        return out


def _report(merge: _Merge, layers: int, quantization: BaseQuantization | None, ctx: Context) -> None:
    changed = len(merge.changed)
    text = f"the adapter changed {changed} of {layers} linear layers"
    if quantization is not None:
        text += f"; the base is the {quantization.quant_type} weights it was trained on, dequantized"
    ctx.emit(Message("info" if changed else "warning", text if changed else text + ": it was not trained", ctx.step))
