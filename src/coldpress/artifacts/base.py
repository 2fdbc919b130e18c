"""Models as they lie on disk, and the little that a plan needs to know of them.

`Spec` says what a model is, from `config.json` and safetensors headers alone; `Artifact` is a folder that describes
itself as one. An artifact in the store is a folder with an `artifact.json`; a plain Hugging Face checkpoint and an
ONNX Runtime GenAI folder are artifacts as they are. A fine-tuned model is a checkpoint (by reference) plus an adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from coldpress.artifacts.adapter_base import ClassifierBase, check_adapter, recorded_base
from coldpress.artifacts.adapter_record import AdapterSpec, adapter_spec, modules_of
from coldpress.artifacts.classifiers import (
    CLASSIFICATION,
    GENERATION,
    classifier_infos,
    classifier_layout,
    is_classifier,
)
from coldpress.artifacts.json_file import read_json
from coldpress.artifacts.quantized import open_checkpoint
from coldpress.artifacts.stored import Packing
from coldpress.artifacts.tensors import TensorFile, TensorInfo
from coldpress.errors import CheckpointError

__all__ = ["AdapterSpec", "Artifact", "BaseQuantization", "Spec", "is_tied", "read_json"]

ARTIFACT_FILE = "artifact.json"
_MARKS = (ARTIFACT_FILE, "genai_config.json", "adapter_config.json", "config.json")


@dataclass(frozen=True)
class BaseQuantization:
    """How the frozen base was quantized while an adapter was trained on it (QLoRA)."""

    quant_type: Literal["nf4", "fp4"]
    double_quant: bool
    compute_dtype: str
    block_size: int = 64


@dataclass(frozen=True)
class Spec:
    """What a model is."""

    kind: Literal["checkpoint", "onnx"]
    config: Mapping[str, Any] = field(repr=False)
    """Hugging Face `config.json`."""
    tensors: tuple[TensorInfo, ...] = field(default=(), repr=False)
    """Weights of a checkpoint, quantized ones as they read."""
    packings: Mapping[str, Packing | str] = field(default_factory=dict, repr=False)
    """Quantized weights by name: how their codes can be taken over, or why not (`artifacts.quantized`)."""
    precision: str = ""
    """float32, float16, bfloat16 for a checkpoint; fp32, int4 ... for ONNX."""
    adapter: AdapterSpec | None = None
    base_quantization: BaseQuantization | None = None
    """Set between QLoRA and the merge."""
    execution_provider: str | None = None
    """What an ONNX model is built for."""
    task: str = GENERATION
    """What it is for: text-generation, or text-classification."""
    lacking: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    """Tensors that the checkpoint does not hold, because it is to become a classifier."""
    unknown: str | None = None
    """Why nothing more is known: the model lies in a registry that was not reached."""

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def context_length(self) -> int | None:
        value = self.config.get("max_position_embeddings")
        return value if isinstance(value, int) else None

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Linear layers of the decoder by module name: (out_features, in_features). Embeddings are left out."""
        return {
            tensor.name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
            for tensor in self.tensors
            if len(tensor.shape) == 2
            and tensor.name.endswith(".weight")
            and "embed" not in tensor.name
            and not tensor.name.startswith(self._head)
        }

    @property
    def _head(self) -> tuple[str, ...]:
        """How the names of a classifier's own weights begin."""
        if self.task != CLASSIFICATION:
            return ()
        layout = classifier_layout(self.config)
        return (*layout.pooler, *(f"{module}." for module in layout.head_modules))

    def as_classifier(self, labels: int = 0) -> Spec:
        """The same with the weights that it has as a classifier, by their names there; raises PlanError."""
        found = classifier_infos(self.config, self.tensors, self.precision, labels)
        lacking = frozenset(name for name, (_, stored) in found.items() if stored is None)
        return replace(self, tensors=tuple(info for info, _ in found.values()), lacking=lacking)

    def mismatch(self, other: Spec) -> str | None:
        """The first thing in which a planned and a found model differ, in words; None when they agree."""
        for name in ("kind", "task", "model_type", "precision", "adapter", "base_quantization", "execution_provider"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}: {mine!r} planned, {theirs!r} found"
        if self.kind == "checkpoint":
            mine_shapes = {tensor.name: tuple(tensor.shape) for tensor in self.tensors}
            their_shapes = {tensor.name: tuple(tensor.shape) for tensor in other.tensors}
            odd = sorted(mine_shapes.keys() ^ their_shapes.keys())
            odd += [name for name in mine_shapes.keys() & their_shapes.keys()
                    if not _same_shape(mine_shapes[name], their_shapes[name])]  # fmt: skip
            if odd:
                return f"{len(odd)} tensors differ, the first: {odd[0]}"
        return None


def _same_shape(mine: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """A size of 0 is one that the plan could not know: how many classes the data has."""
    return len(mine) == len(theirs) and all(0 in pair or pair[0] == pair[1] for pair in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class Artifact:
    """A model on disk. `path` is its folder; a checkpoint's weights may lie elsewhere (`model`)."""

    path: Path
    kind: Literal["checkpoint", "onnx"]
    model: Path
    """Folder with `config.json` and weights, or with `model.onnx`."""
    adapter: Path | None = None
    """PEFT folder with `adapter_config.json` and `adapter_model.safetensors`. An ONNX model takes it as inputs."""
    base_quantization: BaseQuantization | None = None
    tokenizer: Path | None = None
    """Folder with the tokenizer; None is `model`."""
    precision: str | None = None
    """Of an ONNX model: fp32, int4 ..."""
    execution_provider: str | None = None
    """What an ONNX model is built for."""
    task: str | None = None
    """What the model is for, where config.json does not say it: a base that is to become a classifier."""

    @property
    def tokenizer_path(self) -> Path:
        return self.tokenizer or self.model

    @classmethod
    def load(cls, path: Path) -> Artifact:
        """Read a store folder, a checkpoint, an ONNX Runtime GenAI folder, or a run's output folder (`model` inside).

        Raises CheckpointError.
        """
        path = path.resolve()
        if (path / "model").is_dir() and not any((path / name).is_file() for name in _MARKS):
            path = path / "model"
        if (path / ARTIFACT_FILE).is_file():
            return cls.from_record(path, read_json(path / ARTIFACT_FILE))
        if (path / "genai_config.json").is_file():
            return cls(path, "onnx", path)
        if (path / "adapter_config.json").is_file():
            record = read_json(path / "adapter_config.json")
            base = recorded_base(path, record)
            if base is None:
                said = record.get("base_model_name_or_path")
                raise CheckpointError(
                    f"{path} is an adapter; its base model {said!r} is not a local checkpoint folder",
                    hint="give the base as the model and this folder as its adapter",
                )
            tokenizer = path if _has_tokenizer(path) else None
            return cls(path, "checkpoint", base, adapter=path, tokenizer=tokenizer, task=_task_of(record))
        if any(path.glob("*.onnx")) and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            return cls(path, "onnx", path)
        if (path / "config.json").is_file():
            return cls(path, "checkpoint", path)
        what = "has neither config.json nor genai_config.json" if path.is_dir() else "is a file, not a folder"
        what = what if path.exists() else "is not there"
        raise CheckpointError(
            f"{path} {what}, so it is no model",
            hint="a model is a Hugging Face checkpoint folder or an ONNX Runtime GenAI folder",
        )

    def with_adapter(self, adapter: Path) -> Artifact:
        """The same base with another adapter; how that was trained is taken from the artifact it lies in, if any."""
        beside = adapter.parent / ARTIFACT_FILE
        quantization = None
        if beside.is_file():
            whole = Artifact.from_record(adapter.parent, read_json(beside))
            quantization = whole.base_quantization if whole.adapter == adapter.resolve() else None
        return Artifact(
            path=self.path,
            kind="checkpoint",
            model=self.model,
            adapter=adapter,
            base_quantization=quantization,
            task=_task_of(read_json(adapter / "adapter_config.json")),
        )

    @classmethod
    def from_record(cls, path: Path, record: Mapping[str, Any]) -> Artifact:
        """Inverse of `record`; relative places are inside `path`."""

        def place(key: str) -> Path | None:
            value = record.get(key)
            return None if value is None else (path / str(value)).resolve()

        quantization = record.get("base_quantization")
        return cls(
            path=path,
            kind=record["kind"],
            model=place("model") or path,
            adapter=place("adapter"),
            tokenizer=place("tokenizer"),
            base_quantization=None if quantization is None else BaseQuantization(**quantization),
            precision=record.get("precision"),
            execution_provider=record.get("execution_provider"),
            task=record.get("task"),
        )

    def record(self) -> dict[str, Any]:
        """What `artifact.json` holds; places inside the folder are relative."""

        def place(target: Path | None) -> str | None:
            if target is None:
                return None
            try:
                return target.relative_to(self.path).as_posix()
            except ValueError:
                return str(target)

        record = {
            "kind": self.kind,
            "model": place(self.model),
            "adapter": place(self.adapter),
            "tokenizer": place(self.tokenizer),
            "base_quantization": None if self.base_quantization is None else vars(self.base_quantization),
            "precision": self.precision,
            "execution_provider": self.execution_provider,
            "task": self.task,
        }
        return {key: value for key, value in record.items() if value is not None}

    def save(self) -> None:
        """Write `artifact.json` into the folder."""
        (self.path / ARTIFACT_FILE).write_text(json.dumps(self.record(), indent=2) + "\n", encoding="utf-8")

    def moved(self, folder: Path) -> Artifact:
        """The same artifact after its folder was renamed to `folder`."""

        def place(target: Path | None) -> Path | None:
            if target is None or not target.is_relative_to(self.path):
                return target
            return folder / target.relative_to(self.path)

        return replace(
            self,
            path=folder,
            model=place(self.model) or folder,
            adapter=place(self.adapter),
            tokenizer=place(self.tokenizer),
        )

    def describe(self) -> Spec:
        """What the model is, from its configs and headers; raises CheckpointError."""
        if self.kind == "onnx":
            return self._describe_onnx()
        config = self.config()
        task = self.task or (CLASSIFICATION if is_classifier(config) else GENERATION)
        with open_checkpoint(self.model, config) as tensors:
            infos, packings = tuple(tensors.infos()), tensors.packings
            precision = _main_dtype(infos)
            if self.adapter is not None:
                classifier = ClassifierBase(config, precision) if task == CLASSIFICATION else None
                check_adapter(self.adapter, self.model, tensors, tied=is_tied(config, infos), classifier=classifier)
        return Spec(
            kind="checkpoint",
            config=config,
            tensors=infos,
            packings=dict(packings),
            precision=precision,
            task=task,
            adapter=self._describe_adapter(),
            base_quantization=self.base_quantization,
        )

    def config(self) -> dict[str, Any]:
        """config.json; that of an adapter where it makes the base a classifier. Raises CheckpointError."""
        own = None if self.adapter is None else self.adapter / "config.json"
        if own is not None and own.is_file() and is_classifier(found := read_json(own)):
            return found
        return read_json(self.model / "config.json")

    def _describe_adapter(self) -> AdapterSpec | None:
        if self.adapter is None:
            return None
        record = read_json(self.adapter / "adapter_config.json")
        with TensorFile(self.adapter / "adapter_model.safetensors") as own:
            modules = modules_of(info.name for info in own.infos())
        try:
            return adapter_spec(record, modules)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.adapter / 'adapter_config.json'} is no low-rank adapter's config: {error!r}",
                hint="an adapter of PEFT has r, lora_alpha and target_modules there",
            ) from error

    def _describe_onnx(self) -> Spec:
        beside = self.model / "config.json"
        if beside.is_file():
            config = read_json(beside)
        else:
            genai = read_json(self.model / "genai_config.json")
            config = {"model_type": genai.get("model", {}).get("type", "unknown")}
        return Spec(
            kind="onnx",
            config=config,
            precision=self.precision or "",
            adapter=self._describe_adapter(),
            execution_provider=self.execution_provider,
        )


def is_tied(config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> bool:
    """Whether a model uses one matrix as embedding and head."""
    head = any(tensor.name.endswith("lm_head.weight") for tensor in tensors)
    return bool(config.get("tie_word_embeddings", not head))


def _task_of(record: Mapping[str, Any]) -> str | None:
    """What an adapter makes of its base; `record` is adapter_config.json."""
    return CLASSIFICATION if record.get("task_type") == "SEQ_CLS" else None


def _has_tokenizer(path: Path) -> bool:
    return (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file()


def _main_dtype(tensors: tuple[TensorInfo, ...]) -> str:
    """The dtype that holds most bytes."""
    weight: dict[str, int] = {}
    for tensor in tensors:
        weight[tensor.dtype] = weight.get(tensor.dtype, 0) + tensor.nbytes
    return max(weight, key=lambda name: weight[name]) if weight else "unknown"
