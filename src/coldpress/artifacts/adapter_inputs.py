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
    "read_adapter_file",
    "write_inputs",
]

Format = Literal["onnx_adapter", "safetensors", "numpy"]
FORMATS: Mapping[Format, str] = {"onnx_adapter": ".onnx_adapter", "safetensors": ".safetensors", "numpy": ".npz"}
"""How an adapter's inputs may be stored, and how such a file's name ends."""
ADAPTER_FILE = "adapter_weights"
"""Beside a model with LoRA inputs: the adapter that it was built with; the format's ending comes after it."""


def lora_inputs(adapter: AdapterWeights, dtype: str = "float32") -> dict[str, Array]:
    """What a graph with LoRA inputs is given (`graph/lora.py`): A [in, r] and s B [r, out] of each module.

    Raises PlanError for an adapter that is more than low-rank sums on linear layers.
    """
    import numpy as np

    odd = {
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
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
    file.set_parameters(values)
    file.export_adapter(str(path))
    return path


def read_adapter_file(path: Path) -> dict[str, Array]:
    """The inputs that an .onnx_adapter file holds; raises CheckpointError."""
    import onnxruntime

    try:
        return {
            name: value.numpy()
            for name, value in onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters().items()
        }
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} cannot be read as an ONNX Runtime adapter: {error}",
            hint="make it with `coldpress convert-adapters`",
        ) from error


def copy_adapter(source: Path, target: Path) -> Path:
    """Copy config and weights of a PEFT folder; returns `target`."""
    target.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, target / name)
    return target


def _entry(name: str, array: Array) -> tuple[TensorInfo, Callable[[], Array]]:
    return TensorInfo.of(name, array.dtype.name, array.shape), lambda: array


def check_inputs(
    inputs: Mapping[str, Array], wanted: Mapping[str, tuple[str, tuple[int | None, ...]]], place: str
) -> None:
    """Every input must be one of a graph's and fit it; `wanted` gives dtype and shape by name, None for any size.

    Raises CheckpointError.
    """
    if not any(".lora_A." in name for name in wanted):
        raise CheckpointError(f"{place} has no LoRA inputs", hint="build it with ModelBuilder and adapter: inputs")
    odd = []
    for name, array in inputs.items():
        if name not in wanted:
            odd.append(f"{name} is no input of the graph")
            continue
        dtype, shape = wanted[name]
        fits = len(shape) == array.ndim and all(
            want in (None, size) for want, size in zip(shape, array.shape, strict=True)
        )
        if not fits or array.dtype.name != dtype:
            sizes = ", ".join("r" if size is None else str(size) for size in shape)
            odd.append(f"{name} is {array.dtype.name} {list(array.shape)}, the graph wants {dtype} [{sizes}]")
    if odd:
        raise CheckpointError(
            f"the adapter does not fit {place}:\n  " + "\n  ".join(odd[:8]) + ("\n  ..." if len(odd) > 8 else ""),
            hint="it was trained on another model, or changes modules that the graph was not built for",
        )
