"""Add an adapter to its base model: W' = W + s B A, tensor by tensor from file to file, without torch.

    W   base weight [out, in], in the checkpoint's type      A   [r, in]  float32      s   alpha / r
    W'  merged weight, same type: the sum is made in         B   [out, r] float32          (alpha / sqrt(r): rsLoRA)
        float32 and rounded once

After QLoRA there are two bases to choose from. The adapter was trained on 4-bit weights and corrects their errors
too, so by default it is added to these: every linear layer goes through the same quantization again
(`kernels/nf4.py`) and comes back in the checkpoint's type. `base: original` adds it to the 16-bit weights instead: a
model that no training step has seen.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from coldpress.artifacts.base import Artifact, BaseQuantization, Spec, read_json
from coldpress.artifacts.tensors import TensorInfo, TensorSet, numpy_dtype, write_safetensors
from coldpress.config.schema import Frozen
from coldpress.data.tokenizer import copy_tokenizer
from coldpress.errors import CheckpointError, PlanError
from coldpress.events import Message, Progress
from coldpress.nn.adapters import decoder_linears, four_bit_names
from coldpress.passes.base import Context, Estimate, Limits, PlanContext, Planned

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["AdapterWeights", "Delta", "MergeAdapterWeights", "MergeAdapterWeightsConfig"]

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
        planned = Spec(kind="checkpoint", config=spec.config, tensors=spec.tensors, precision=spec.precision)
        largest = max((math.prod(tensor.shape) for tensor in spec.tensors), default=0)
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
                ram=(150 << 20) + largest * (8 if spec.base_quantization else 4) + 2 * ROWS_BYTES,
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
        quantization = None if config.base == "original" else model.base_quantization
        spec = model.describe()
        in_four_bits = set(four_bit_names(spec.linear_layers())) if quantization is not None else set()
        with TensorSet.open(model.model) as base, AdapterWeights.open(model.adapter) as adapter:
            adapter.check(base)
            merge = _Merge(base, adapter, quantization, in_four_bits, ctx)
            write_safetensors(ctx.output / "model.safetensors", merge.tensors(), {"format": "pt"})
        _report(merge, len(decoder_linears(spec.linear_layers())), ctx)
        _copy_configs(model.model, ctx.output)
        copy_tokenizer(model.tokenizer_path, ctx.output)
        if model.tokenizer_path != model.model:
            copy_tokenizer(model.model, ctx.output)
        return Artifact(path=ctx.output, kind="checkpoint", model=ctx.output)


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one weight: scale * second @ first."""

    first: npt.NDArray[Any]
    """A [r, in], float32."""
    second: npt.NDArray[Any]
    """B [out, r], float32."""
    scale: float
    transposed: bool = False
    """The weight lies as [in, out]: embeddings, and Conv1D layers."""

    @property
    def shape(self) -> tuple[int, int]:
        shape = (self.second.shape[0], self.first.shape[1])
        return (shape[1], shape[0]) if self.transposed else shape

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows of the product in the weight's own layout, float32."""
        import numpy as np

        left, right = (self.first.T, self.second.T) if self.transposed else (self.second, self.first)
        product = left[start:stop] @ right
        return np.asarray(product * np.float32(self.scale), np.float32)


class AdapterWeights:
    """A PEFT LoRA folder: deltas by weight name, and weights that replace the base's."""

    PREFIX = "base_model.model."

    def __init__(self, folder: Path, record: Mapping[str, Any], tensors: TensorSet) -> None:
        self.folder = folder
        self._record = record
        self._tensors = tensors
        names = [info.name for info in tensors.infos()]
        self._pairs: dict[str, tuple[str, str]] = {}
        self.replaced: dict[str, str] = {}
        """Weight name -> name in the adapter file, for modules that were trained whole."""
        for name in names:
            if not name.startswith(self.PREFIX):
                raise CheckpointError(f"{folder}: {name!r} is not a tensor of a PEFT adapter")
            inner = name.removeprefix(self.PREFIX)
            for down, up in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
                if inner.endswith(down):
                    module = inner.removesuffix(down)
                    self._pairs[f"{module}.weight"] = (name, self.PREFIX + module + up)
                    break
                if inner.endswith(up):
                    break
            else:
                if "lora_" in inner:
                    raise CheckpointError(f"{folder}: {name!r} belongs to a kind of adapter that cannot be merged yet")
                self.replaced[inner] = name
        lonely = sorted(second for _, second in self._pairs.values() if second not in tensors)
        if lonely:
            raise CheckpointError(f"{folder} lacks {len(lonely)} tensors, the first: {lonely[0]}")

    @classmethod
    def open(cls, folder: Path) -> AdapterWeights:
        """Raises CheckpointError for a damaged adapter, PlanError for a kind that cannot be merged."""
        record = read_json(folder / "adapter_config.json")
        _refuse_unmergeable(record)
        tensors = TensorSet.open(folder / "adapter_model.safetensors")
        try:
            return cls(folder, record, tensors)
        except BaseException:
            tensors.close()
            raise

    def __enter__(self) -> AdapterWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.close()

    @property
    def changed(self) -> frozenset[str]:
        """Names of the weights that the adapter touches."""
        return frozenset((*self._pairs, *self.replaced))

    def delta(self, weight: str) -> Delta | None:
        """What is added to this weight; None when nothing is."""
        import numpy as np

        if weight not in self._pairs:
            return None
        first_name, second_name = self._pairs[weight]
        first = self._tensors.read(first_name).astype(np.float32)
        second = self._tensors.read(second_name).astype(np.float32)
        embedding = first_name.endswith("lora_embedding_A")
        transposed = embedding or bool(self._record.get("fan_in_fan_out"))
        return Delta(first, second, self._scale(weight.removesuffix(".weight"), first.shape[0]), transposed)

    def replacement(self, weight: str) -> npt.NDArray[Any] | None:
        """The whole weight, where it was trained whole."""
        return self._tensors.read(self.replaced[weight]) if weight in self.replaced else None

    def check(self, base: TensorSet) -> None:
        """Every tensor of the adapter must belong to a weight of the base and fit it; raises CheckpointError."""
        strangers = sorted(name for name in self.changed if name not in base)
        if strangers:
            raise CheckpointError(
                f"{self.folder} changes {len(strangers)} weights that the base model does not have: "
                + ", ".join(strangers[:8])
                + (" ..." if len(strangers) > 8 else ""),
                hint="it was trained on another model",
            )
        for name, (first, second) in self._pairs.items():
            inner, outer = self._tensors.info(first).shape[1], self._tensors.info(second).shape[0]
            if sorted(base.info(name).shape) != sorted((outer, inner)):
                raise CheckpointError(
                    f"{self.folder}: the adapter of {name} is for a weight of shape [{outer}, {inner}], "
                    f"the base has {list(base.info(name).shape)}",
                    hint="it was trained on another model",
                )
        for name, own in self.replaced.items():
            if base.info(name).shape != self._tensors.info(own).shape:
                raise CheckpointError(f"{self.folder}: {name} has another shape than in the base model")

    def _scale(self, module: str, rank: int) -> float:
        """alpha / r, with PEFT's patterns: a key is a regular expression for the end of the module's name."""
        alpha = float(self._record["lora_alpha"])
        for pattern, value in (self._record.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = float(value)
                break
        return alpha / math.sqrt(rank) if self._record.get("use_rslora") else alpha / rank


def _refuse_unmergeable(record: Mapping[str, Any]) -> None:
    kind = str(record.get("peft_type"))
    if kind != "LORA":
        raise PlanError(f"the adapter is of the type {kind}, and only LORA can be merged yet")
    odd = [
        said
        for key, said in (
            ("use_dora", "DoRA"),
            ("use_qalora", "QA-LoRA"),
            ("lora_bias", "a bias in B"),
            ("layer_replication", "layer replication"),
            ("trainable_token_indices", "trained tokens"),
            ("alora_invocation_tokens", "activated LoRA"),
        )
        if record.get(key)
    ]
    start = str(record.get("init_lora_weights"))
    if start.startswith(("pissa", "olora", "loftq", "corda")):
        odd.append(f"the initialisation {start}, which changes the base as well")
    if odd:
        raise PlanError(f"the adapter uses {', '.join(odd)}, which cannot be merged yet", hint="merge it with PEFT")


@dataclass
class _Merge:
    """The tensors of the merged model, each made when it is written."""

    base: TensorSet
    adapter: AdapterWeights
    quantization: BaseQuantization | None
    in_four_bits: set[str]
    ctx: Context
    changed: list[str] = field(default_factory=list)

    def tensors(self) -> Iterator[tuple[TensorInfo, Callable[[], npt.NDArray[Any]]]]:
        infos = sorted(self.base.infos(), key=lambda info: info.name)
        for place, info in enumerate(infos, start=1):
            yield info, self._producer(info, place, len(infos))

    def _producer(self, info: TensorInfo, place: int, total: int) -> Callable[[], npt.NDArray[Any]]:
        def produce() -> npt.NDArray[Any]:
            tensor = self._merged(info)
            self.ctx.emit(Progress(self.ctx.step, place, total, "tensors"))
            return tensor

        return produce

    def _merged(self, info: TensorInfo) -> npt.NDArray[Any]:
        import numpy as np

        dtype = numpy_dtype(info.dtype)
        whole = self.adapter.replacement(info.name)
        if whole is not None:
            self.changed.append(info.name)
            return whole.astype(dtype)
        weight = self._base(info)
        delta = self.adapter.delta(info.name)
        if delta is None:
            return weight.astype(dtype, copy=False)
        if delta.shape != info.shape:
            raise CheckpointError(f"the adapter of {info.name} has shape {delta.shape}, the weight {info.shape}")
        out = np.empty(info.shape, dtype)
        rows = max(1, ROWS_BYTES // (4 * info.shape[1]))
        differs = False
        for start in range(0, info.shape[0], rows):
            stop = min(start + rows, info.shape[0])
            before = weight[start:stop].astype(np.float32)
            out[start:stop] = (before + delta.rows(start, stop)).astype(dtype)
            differs = differs or bool((out[start:stop] != before.astype(dtype)).any())
        if differs:
            self.changed.append(info.name)
        return out

    def _base(self, info: TensorInfo) -> npt.NDArray[Any]:
        """The weight as the adapter saw it: as it is, or through 4 bits."""
        weight = self.base.read(info.name)
        if self.quantization is None or info.name.removesuffix(".weight") not in self.in_four_bits:
            return weight
        from coldpress.kernels.nf4 import round_trip

        # The base was loaded in the compute type, quantized, and dequantized to that type in every step.
        dtype = numpy_dtype(self.quantization.compute_dtype)
        return round_trip(
            weight.astype(dtype), quant_type=self.quantization.quant_type, double_quant=self.quantization.double_quant
        ).astype(dtype)


def _report(merge: _Merge, layers: int, ctx: Context) -> None:
    changed = len(merge.changed)
    text = f"the adapter changed {changed} of {layers} linear layers"
    if merge.quantization is not None:
        text += f"; the base is the {merge.quantization.quant_type} weights it was trained on, dequantized"
    ctx.emit(Message("info" if changed else "warning", text if changed else text + ": it was not trained", ctx.step))


def _copy_configs(source: Path, target: Path) -> None:
    """`config.json` and what else describes the model; code of its own comes along."""
    for path in sorted(source.glob("*")):
        known = path.name in ("config.json", "generation_config.json") or path.suffix == ".py"
        if path.is_file() and known:
            shutil.copyfile(path, target / path.name)
    config = read_json(target / "config.json")
    if config.pop("quantization_config", None) is not None:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
