"""The weights of a checkpoint under their names in the model, whatever a quantization tool stored them as.

`quantization_config` in config.json says which tool it was; which matrices it quantized is seen from the tensors
themselves, so that lists of layers left out need not be interpreted. A quantized matrix reads as float32; where its
codes can run as they are, `packings` says so and `codes` gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from coldpress.artifacts.stored import (
    Codes,
    Grouped,
    Packing,
    StoredMatrix,
    awq,
    bitsandbytes_4bit,
    float8,
    gptq,
    int8,
    packed_int32,
)
from coldpress.artifacts.stored_experts import is_turned, mxfp4_experts
from coldpress.artifacts.tensors import TensorInfo, TensorSet, TensorSource
from coldpress.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Checkpoint", "CodedSource", "agreed_packing", "open_checkpoint"]

_RUNTIME_ONLY = (
    ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point",
    ".activation_scale", ".k_scale", ".v_scale",
)  # fmt: skip
"""Scales of activations and of the key/value cache: they are no weights."""
_OTHER_FORM = "take the model in another quantization, or unquantized"
_NO_PACKING = "it is stored in floating point"

Recognized = Iterator[StoredMatrix]


class CodedSource(TensorSource, Protocol):
    """A source some of whose matrices can be had as codes."""

    @property
    def packings(self) -> Mapping[str, Packing | str]:
        """By name: how a matrix's codes can be taken over, or why they cannot. Plain matrices are absent."""
        ...

    def codes(self, name: str, start: int, stop: int) -> Codes:
        """Rows of a matrix that has a `Packing`."""
        ...

    def order(self, name: str) -> npt.NDArray[np.int64] | None:
        """The columns in the order in which `codes` has them; None is their own."""
        ...


class Checkpoint:
    """The weights of a checkpoint folder, as a `CodedSource`."""

    def __init__(self, tensors: TensorSet, stored: Iterable[StoredMatrix] = ()) -> None:
        self._tensors = tensors
        self._stored = {matrix.info.name: matrix for matrix in stored}
        parts = {name for matrix in self._stored.values() for name in matrix.tensors}
        self._plain = {
            info.name: info
            for info in tensors.infos()
            if info.name not in parts and not (self._stored and info.name.endswith(_RUNTIME_ONLY))
        }
        self.packings: Mapping[str, Packing | str] = MappingProxyType(
            {name: matrix.packing for name, matrix in self._stored.items() if not is_turned(name)}
        )

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._tensors.close()

    def __contains__(self, name: object) -> bool:
        return name in self._stored or name in self._plain

    def infos(self) -> Iterator[TensorInfo]:
        yield from self._plain.values()
        yield from (matrix.info for name, matrix in self._stored.items() if not is_turned(name))

    def info(self, name: str) -> TensorInfo:
        if name in self._stored:
            return self._stored[name].info
        return self._tensors.info(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows of a tensor, quantized ones in float32; peak memory is a few times these rows."""
        matrix = self._stored.get(name)
        if matrix is None:
            return self._tensors.read(name, start, stop)
        n = matrix.info.shape[0]
        stop = n if stop is None else min(stop, n)
        return matrix.rows(start, max(stop, start))

    def codes(self, name: str, start: int, stop: int) -> Codes:
        return self._grouped(name).codes(start, stop)

    def order(self, name: str) -> npt.NDArray[np.int64] | None:
        return self._grouped(name).order()

    def _grouped(self, name: str) -> Grouped:
        matrix = self._stored[name]
        if not isinstance(matrix, Grouped):
            raise TypeError(f"{name}: {matrix.packing}")
        return matrix


def open_checkpoint(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """The weights of a folder; `config` is its config.json.

    Raises CheckpointError for damage and PlanError for a quantization that is not read.
    """
    tensors = TensorSet.open(folder)
    try:
        return Checkpoint(tensors, _stored(tensors, config))
    except BaseException:
        tensors.close()
        raise


def agreed_packing(packings: Mapping[str, Packing | str], parts: Iterable[str]) -> Packing | str:
    """The packing that all parts of a stacked matrix have, or why they cannot be taken over together."""
    names = list(dict.fromkeys(parts))
    found = [packings.get(name, _NO_PACKING) for name in names]
    for name, packing in zip(names, found, strict=True):
        if isinstance(packing, str):
            return f"{name}: {packing}"
        if packing != found[0]:
            return f"{names[0]} and {name} are packed differently, but run as one product"
    return found[0]


def _stored(tensors: TensorSet, config: Mapping[str, Any]) -> list[StoredMatrix]:
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return []
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"quantization_config in config.json must be an object, got {settings!r}")
    method = str(settings.get("quant_method", ""))
    if method not in _METHODS:
        raise PlanError(
            f"the checkpoint is quantized by {method or 'an unnamed method'}; read are {', '.join(_METHODS)}",
            hint=_OTHER_FORM,
        )
    found = list(_METHODS[method](tensors, settings))
    if not found and method != "bitsandbytes":  # bitsandbytes' config may ask for quantization when loading
        raise CheckpointError(
            f"config.json says the checkpoint is quantized by {method}, but no tensor of it is",
            hint="remove quantization_config from config.json if the weights are plain",
        )
    return found


def _layers(tensors: TensorSet, suffix: str) -> Iterator[str]:
    return (info.name.removesuffix(suffix) for info in tensors.infos() if info.name.endswith(suffix))


def _refuse_form(what: str, given: Any, known: tuple[str, ...]) -> None:
    if str(given).lower() not in known:
        raise PlanError(f"{what} of the checkpoint is {given!r}; read is {' or '.join(known)}", hint=_OTHER_FORM)


def _integer(settings: Mapping[str, Any], *keys: str) -> int | None:
    found = next((settings[key] for key in keys if key in settings), None)
    return found if isinstance(found, int) else None


def _block(settings: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    """Rows and columns that share a scale; older files of compressed-tensors write them as 128x128."""
    said = settings.get(key)
    if said is None:
        return None
    sizes = said.split("x") if isinstance(said, str) else said
    try:
        rows, columns = (int(size) for size in sizes)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise CheckpointError(f"{key} in config.json must be two whole numbers above 0, got {said!r}")
    return rows, columns


def _refuse_float_words(weights: Any, form: str) -> None:
    """Floats of 4 bits, and floats packed like integers, are other numbers than their codes."""
    if not isinstance(weights, Mapping) or weights.get("type", "int") == "int":
        return
    if weights.get("num_bits") != 8 or form in ("pack-quantized", "int-quantized"):
        what = f"the type of {weights.get('num_bits')}-bit compressed-tensors weights ({form})"
        _refuse_form(what, weights["type"], ("int",))


def _gptq(tensors: TensorSet, settings: Mapping[str, Any]) -> Recognized:
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    form = "marlin" if settings.get("is_marlin_format") else form
    _refuse_form("the GPTQ format", form, ("gptq", "gptq_v2"))
    _refuse_form("the GPTQ word", settings.get("pack_dtype", "int32"), ("int32",))
    for layer in _layers(tensors, ".qweight"):
        yield gptq(
            tensors,
            layer,
            group=_integer(settings, "group_size"),
            symmetric=bool(settings.get("sym", True)),
            first_format=str(form).lower() == "gptq",
            ordered=bool(settings.get("desc_act")),
        )


def _awq(tensors: TensorSet, settings: Mapping[str, Any]) -> Recognized:
    _refuse_form("the AWQ layout", settings.get("version") or settings.get("format") or "gemm", ("gemm",))
    for layer in _layers(tensors, ".qweight"):
        symmetric = settings.get("zero_point", True) is False
        yield awq(tensors, layer, group=_integer(settings, "group_size", "q_group_size"), symmetric=symmetric)


def _compressed(tensors: TensorSet, settings: Mapping[str, Any]) -> Recognized:
    if settings.get("transform_config"):
        raise PlanError("the checkpoint rotates activations at run time (transform_config)", hint=_OTHER_FORM)
    groups = settings.get("config_groups")
    schemes = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    forms = {str(scheme.get("format") or settings.get("format") or "dense") for scheme in schemes}
    for form in forms - {"mixed-precision"}:
        known = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
        _refuse_form("the compressed-tensors format", form, known)
    for scheme in schemes:
        _refuse_float_words(scheme.get("weights"), str(scheme.get("format") or settings.get("format")))
    weights = [scheme["weights"] for scheme in schemes if isinstance(scheme.get("weights"), Mapping)]
    sizes = {size for one in weights if (size := _integer(one, "group_size")) is not None}
    group = sizes.pop() if len(sizes) == 1 else None
    bits = tuple(dict.fromkeys(width for one in weights if (width := _integer(one, "num_bits")) is not None))
    blocks = [found for one in weights if (found := _block(one, "block_structure")) is not None]
    for layer in _layers(tensors, ".weight_packed"):
        if not bits:
            raise CheckpointError(
                f"{layer} holds packed codes, and no group of config_groups in config.json says of how many bits",
                hint="is config.json that of this checkpoint?",
            )
        yield packed_int32(tensors, layer, group=group, bits=bits)
    for layer in _layers(tensors, ".weight"):
        dtype, scales = tensors.info(f"{layer}.weight").dtype, f"{layer}.weight_scale"
        if dtype == "int8":
            yield int8(tensors, layer, group=group)
        elif dtype.startswith("float8"):
            yield float8(tensors, layer, scales, block=blocks[0] if blocks else None)


def _fp8(tensors: TensorSet, settings: Mapping[str, Any]) -> Recognized:
    block = _block(settings, "weight_block_size")
    for layer in _layers(tensors, ".weight"):
        if not tensors.info(f"{layer}.weight").dtype.startswith("float8"):
            continue
        names = [f"{layer}.{part}" for part in ("weight_scale_inv", "weight_scale") if f"{layer}.{part}" in tensors]
        if not names:
            raise CheckpointError(
                f"{layer}.weight is float8 and has neither weight_scale nor weight_scale_inv beside it",
                hint="is the download complete?",
            )
        yield float8(tensors, layer, names[0], block=block)


def _bitsandbytes(tensors: TensorSet, settings: Mapping[str, Any]) -> Recognized:
    if settings.get("load_in_8bit") and next(_layers(tensors, ".SCB"), None) is not None:
        raise PlanError("the checkpoint is quantized by bitsandbytes to 8 bits; read are 4 bits", hint=_OTHER_FORM)
    for kind in ("nf4", "fp4"):
        suffix = f".weight.quant_state.bitsandbytes__{kind}"
        for layer in _layers(tensors, suffix):
            yield bitsandbytes_4bit(tensors, layer, layer + suffix)


def _mxfp4(tensors: TensorSet, settings: Mapping[str, Any]) -> Recognized:
    for name in _layers(tensors, "_blocks"):
        yield from mxfp4_experts(tensors, name)


_METHODS: Mapping[str, Callable[[TensorSet, Mapping[str, Any]], Recognized]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
}
