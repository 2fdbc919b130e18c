"""A LoRA adapter as the inputs of an ONNX graph (`graph/lora.py`), and the files that hold them.

Names and shapes are those of Olive's `convert-adapters`, so that files of either fit graphs of both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coldpress.artifacts.adapter import EMBEDDING, AdapterWeights
from coldpress.artifacts.tensors import TensorInfo, numpy_dtype, write_safetensors
from coldpress.errors import CheckpointError, MissingExtraError, PlanError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = [
    "ADAPTER_FILE",
    "FORMATS",
    "Format",
    "check_inputs",
    "copy_adapter",
    "lora_inputs",
    "outlines",
    "read_adapter_file",
    "write_inputs",
]

Format = Literal["onnx_adapter", "safetensors", "numpy"]
FORMATS: Mapping[Format, str] = {"onnx_adapter": ".onnx_adapter", "safetensors": ".safetensors", "numpy": ".npz"}
"""How an adapter's inputs may be stored, and how such a file's name ends."""
_ELEMENT_TYPES: Mapping[int, str] = {1: "float32", 10: "float16", 16: "bfloat16"}
"""Of onnx.TensorProto."""
Outline = tuple[str, tuple[int | None, ...]]
"""Type and shape of an input; None is any size."""
ADAPTER_FILE = "adapter_weights"
"""Beside a model with LoRA inputs: the adapter that it was built with; the format's ending comes after it."""


def lora_inputs(adapter: AdapterWeights, dtype: str = "float32") -> dict[str, Array]:
    """What a graph with LoRA inputs is given (`graph/lora.py`): A [in, r] and s B [r, out] of each module.

    Raises PlanError for an adapter that is more than low-rank sums on linear layers.
    """
    import numpy as np

    odd = {
        "LoHa or LoKr": len(adapter.products),
        "DoRA": sum(pair.magnitude is not None for pair in adapter.pairs.values()),
        "LoRA on embeddings": sum(name.endswith(EMBEDDING) for name in adapter.pairs),
        "LoRA on Conv1D layers": sum(
            pair.transposed and not name.endswith(EMBEDDING) for name, pair in adapter.pairs.items()
        ),
        "weights trained whole (modules_to_save)": len(adapter.replaced),
        "trained tokens": len(adapter.tokens),
        "biases (lora_bias)": len(adapter.biases),
    }
    found = [f"{what}: {count}" for what, count in odd.items() if count]
    if found:
        raise PlanError(
            f"{adapter.folder} cannot be given to a graph as inputs, it holds more than LoRA on linear layers: "
            + ", ".join(found),
            hint="merge it: MergeAdapterWeights, or ModelBuilder with adapter: merge",
        )
    inputs: dict[str, Array] = {}
    for name, pair in adapter.pairs.items():
        module = name.removesuffix(".weight")
        scaled = adapter.read(pair.second) * np.float32(pair.scale)
        for end, array in (("A", adapter.read(pair.first)), ("B", scaled)):
            with np.errstate(over="ignore"):
                inputs[f"{module}.lora_{end}.weight"] = np.ascontiguousarray(array.T).astype(numpy_dtype(dtype))
            if not np.isfinite(inputs[f"{module}.lora_{end}.weight"]).all():
                raise CheckpointError(f"{adapter.folder}: {end} of {module} holds values that {dtype} cannot")
    return inputs


def write_inputs(path: Path, inputs: Mapping[str, Array], form: Format = "onnx_adapter") -> Path:
    """Write a graph's LoRA inputs beside `path`, with the ending of the format; returns the file."""
    path = path if path.name.endswith(FORMATS[form]) else path.with_name(path.name + FORMATS[form])
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "safetensors":
        write_safetensors(path, [_entry(name, array) for name, array in inputs.items()])
        return path
    if form == "numpy":
        import numpy as np

        np.savez(path, allow_pickle=False, **inputs)
        return path
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "onnxruntime is not installed", hint="pip install 'coldpress[cpu]' (or [gpu])"
        ) from error
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    # By element type, because ONNX Runtime takes bfloat16 from NumPy in no other way.
    make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    types = {name: kind for kind, name in _ELEMENT_TYPES.items()}
    bits = {2: "uint16", 4: "float32"}
    file.set_parameters(
        {name: make(array.view(bits[array.itemsize]), types[array.dtype.name]) for name, array in inputs.items()}
    )
    file.export_adapter(str(path))
    return path


def read_adapter_file(path: Path) -> dict[str, Outline]:
    """Type and shape of the inputs that an .onnx_adapter file holds; raises CheckpointError."""
    import onnxruntime

    try:
        held = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} cannot be read as an ONNX Runtime adapter: {error}",
            hint="make it with `coldpress convert-adapters`",
        ) from error
    return {
        name: (_ELEMENT_TYPES.get(value.element_type(), "another type"), tuple(value.shape()))
        for name, value in held.items()
    }


def copy_adapter(source: Path, target: Path) -> Path:
    """Copy config and weights of a PEFT folder; returns `target`."""
    target.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, target / name)
    return target


def _entry(name: str, array: Array) -> tuple[TensorInfo, Callable[[], Array]]:
    return TensorInfo.of(name, array.dtype.name, array.shape), lambda: array


def outlines(inputs: Mapping[str, Array]) -> dict[str, Outline]:
    """Type and shape of each."""
    return {name: (array.dtype.name, array.shape) for name, array in inputs.items()}


def check_inputs(found: Mapping[str, Outline], wanted: Mapping[str, Outline], place: str) -> None:
    """Every input found must be one of the graph's and fit it; raises CheckpointError."""
    if not any(".lora_A." in name for name in wanted):
        raise CheckpointError(f"{place} has no LoRA inputs", hint="build it with ModelBuilder and adapter: inputs")
    odd = []
    for name, (own, sizes) in found.items():
        if name not in wanted:
            odd.append(f"{name} is no input of the graph")
            continue
        dtype, shape = wanted[name]
        fits = len(shape) == len(sizes) and all(want in (None, size) for want, size in zip(shape, sizes, strict=True))
        if not fits or own != dtype:
            written = ", ".join("r" if size is None else str(size) for size in shape)
            odd.append(f"{name} is {own} {list(sizes)}, the graph wants {dtype} [{written}]")
    if odd:
        raise CheckpointError(
            f"the adapter does not fit {place}:\n  " + "\n  ".join(odd[:8]) + ("\n  ..." if len(odd) > 8 else ""),
            hint="it was trained on another model, or changes modules that the graph was not built for",
        )
