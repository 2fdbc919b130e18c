"""Matrices as quantization tools store them: what their headers come to, their rows dequantized, and their codes.

    W [n, k] is stored as (X is the layer, G the groups of a row)
    GPTQ      X.qweight int32 [k*bits/32, n], X.qzeros int32 [G, n*bits/32], X.scales [G, n], X.g_idx int32 [k]
    AWQ       X.qweight int32 [k, n/8], X.qzeros int32 [G, n/8], X.scales [G, n]
    packed    X.weight_packed int32 [n, k*bits/32], X.weight_scale [n, G], X.weight_zero_point int32 [n*bits/32, G],
              X.weight_shape int64 [2]
    int8      X.weight int8 [n, k], X.weight_scale [n, G] or [1], X.weight_zero_point int8 like it
    fp8       X.weight float8 [n, k], X.weight_scale or X.weight_scale_inv: one, one a row, or one a block of W
    4-bit     X.weight uint8 [n*k/2, 1], X.weight.absmax, .quant_map, .quant_state.bitsandbytes__nf4 (JSON), .nested_...

`packed` and `int8` are compressed-tensors' pack-quantized and int-quantized, `4-bit` is bitsandbytes'. Bits, groups and
shapes come from the headers; how the words are made up stands in `kernels.packed`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from coldpress.artifacts.tensors import TensorInfo, TensorSource
from coldpress.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Bytes = npt.NDArray[np.uint8]
    Floats = npt.NDArray[np.float32]

__all__ = [
    "Codes",
    "Grouped",
    "Packing",
    "StoredMatrix",
    "awq",
    "bitsandbytes_4bit",
    "float8",
    "gptq",
    "int8",
    "packed_int32",
]

_BLOCK_SIZES = (256, 128, 64, 32, 16)
"""Of MatMulNBits."""
_WIDE_BLOCK = 128
"""The largest block that a larger group is cut into: int8 activations share a scale over a block too."""
_DAMAGED = "the checkpoint is damaged, or its config.json belongs to another one"


@dataclass(frozen=True)
class Packing:
    """Codes that MatMulNBits can run as they are stored. Parts of one product must have equal ones."""

    method: str
    """gptq, awq ..."""
    bits: int
    group: int
    """Columns that share a scale."""
    block_size: int
    """Of MatMulNBits: the group, or a divisor of it."""
    symmetric: bool
    scale_dtype: str
    order: str = ""
    """A digest of the order that makes groups consecutive columns; empty: they are."""


@dataclass(frozen=True)
class Codes:
    """Rows of a matrix; see the head of `kernels.packed`. Columns are in the order that `Packing.order` stands for."""

    rows: Bytes
    scales: Array
    zeros: Bytes | None


class StoredMatrix(Protocol):
    """One matrix of a checkpoint, under its name in the model."""

    @property
    def info(self) -> TensorInfo:
        """As it reads: [n, k] in float32."""
        ...

    @property
    def tensors(self) -> tuple[str, ...]:
        """What it is stored as."""
        ...

    @property
    def packing(self) -> Packing | str:
        """How its codes can be taken over, or why they cannot."""
        ...

    def rows(self, start: int, stop: int) -> Floats:
        """Dequantized."""
        ...


@dataclass(frozen=True)
class Grouped:
    """A matrix of 4- or 8-bit codes whose columns share scales in groups."""

    source: TensorSource = field(repr=False)
    info: TensorInfo
    tensors: tuple[str, ...]
    method: str
    bits: int
    group: int
    symmetric: bool
    scale_dtype: str
    group_of: Array | None = field(repr=False, compare=False)
    """Group of each column; None is column / group."""
    read: Callable[[int, int], Codes] = field(repr=False, compare=False)
    """Rows as stored: columns in their own order, zero points always."""

    @property
    def k(self) -> int:
        return self.info.shape[1]

    @property
    def packing(self) -> Packing | str:
        if self.group in _BLOCK_SIZES and self.k % self.group == 0:
            block = self.group
        else:
            common = math.gcd(self.group, self.k)
            fitting = [size for size in _BLOCK_SIZES if size <= _WIDE_BLOCK and common % size == 0]
            if not fitting:
                return f"groups of {self.group} over {self.k} columns are no whole blocks of 16 to 256"
            block = fitting[0]
        order = self.order()
        if self.group_of is not None and order is None:
            return "its columns are assigned to groups of different sizes"
        digest = "" if order is None else hashlib.sha256(order.tobytes()).hexdigest()[:16]
        return Packing(self.method, self.bits, self.group, block, self.symmetric, self.scale_dtype, digest)

    def order(self) -> npt.NDArray[np.int64] | None:
        """The columns, sorted by group; None where they are, or where groups are not of equal size."""
        import numpy as np

        if self.group_of is None:
            return None
        counts = np.bincount(self.group_of)
        return None if (counts != self.group).any() else np.argsort(self.group_of, kind="stable").astype(np.int64)

    def codes(self, start: int, stop: int) -> Codes:
        """Rows in the order of `order`; raises CheckpointError where symmetric codes have another zero point."""
        from coldpress.kernels.packed import pack_codes, unpack_bytes

        found = self.read(start, stop)
        rows, zeros, order = found.rows, found.zeros, self.order()
        if order is not None:
            rows = pack_codes(unpack_bytes(rows, self.bits)[:, order], self.bits)
        if self.symmetric and zeros is not None:
            odd = zeros != 1 << (self.bits - 1)
            if odd.any():
                row, group = (int(place[0]) for place in odd.nonzero())
                raise CheckpointError(
                    f"config.json calls the {self.method} codes symmetric, but row {start + row} of {self.info.name} "
                    f"has zero point {zeros[row, group]} in group {group}",
                    hint=_DAMAGED,
                )
            zeros = None
        return Codes(rows, found.scales, zeros)

    def rows(self, start: int, stop: int) -> Floats:
        import numpy as np

        from coldpress.kernels.packed import dequantize_groups, unpack_bytes

        found = self.read(start, stop)
        group_of = np.arange(self.k) // self.group if self.group_of is None else self.group_of
        codes = unpack_bytes(found.rows, self.bits)[:, : self.k]
        return dequantize_groups(codes, found.scales, found.zeros, bits=self.bits, group_of=group_of)


def _logical(layer: str, n: int, k: int) -> TensorInfo:
    return TensorInfo.of(f"{layer}.weight", "float32", (n, k))


def _expect(source: TensorSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [
        f"{name} has shape {list(source.info(name).shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if source.info(name).shape != shape
    ]
    if wrong:
        raise CheckpointError("the parts of a quantized matrix contradict each other: " + ", ".join(wrong),
                              hint=_DAMAGED)  # fmt: skip


def _typed(source: TensorSource, types: Mapping[str, tuple[str, ...]]) -> None:
    """Words are taken as bits, so that another type would read as noise."""
    wrong = [
        f"{name} is {source.info(name).dtype} instead of {' or '.join(known)}"
        for name, known in types.items()
        if source.info(name).dtype not in known
    ]
    if wrong:
        raise CheckpointError("codes of a quantized matrix have another type than their format: " + ", ".join(wrong),
                              hint=_DAMAGED)  # fmt: skip


def _group(layer: str, k: int, groups: int, stated: int | None) -> int:
    """Columns of a group. What config.json states counts where it fits: single layers may differ."""
    if groups <= 1:
        return k
    if stated is not None and stated > 0 and -(-k // stated) == groups:
        return stated
    if k % groups:
        raise CheckpointError(f"{layer} has {groups} groups over {k} columns, config.json says {stated} a group",
                              hint=_DAMAGED)  # fmt: skip
    return k // groups


def _bits(layer: str, counted: int, tool: str, known: tuple[int, ...] = (4, 8)) -> int:
    if counted not in known:
        raise PlanError(
            f"{layer} holds {tool} codes of {counted} bits; read are {' and '.join(map(str, known))}",
            hint="take the model in another quantization, or unquantized",
        )
    return counted


def gptq(
    source: TensorSource, layer: str, *, group: int | None, symmetric: bool, first_format: bool, ordered: bool
) -> Grouped:
    """`first_format`: zero points are stored less one. `ordered`: groups are not consecutive columns (desc_act)."""
    import numpy as np

    from coldpress.kernels.packed import add_to_codes, transposed_words, unpack_bytes

    weight, zeros, scales = (f"{layer}.{part}" for part in ("qweight", "qzeros", "scales"))
    groups, n = _matrix(source, scales)
    _typed(source, {weight: ("int32",), zeros: ("int32",)})
    columns = _matrix(source, zeros)[1]
    bits = _bits(layer, 32 * columns // n if n else 0, "gptq")
    k = source.info(weight).shape[0] * 32 // bits
    _expect(source, {weight: (k * bits // 32, n), zeros: (groups, n * bits // 32)})
    size = _group(layer, k, groups, group)
    index, group_of = f"{layer}.g_idx", None
    tensors = (weight, zeros, scales, *((index,) if index in source else ()))
    if ordered and groups > 1 and index not in source:
        raise CheckpointError(
            f"config.json says desc_act, so that the columns of {layer} lie in {groups} groups in an order of their "
            f"own, and {index}, which holds it, is missing",
            hint="is the download complete? where groups are consecutive, set desc_act to false in config.json",
        )
    if index in source:
        _expect(source, {index: (k,)})
        _typed(source, {index: ("int32", "int64")})
        stored = np.asarray(source.read(index), np.int64)
        if not np.array_equal(stored, np.arange(k) // size):
            if stored.min() < 0 or stored.max() >= groups:
                raise CheckpointError(f"{index} names group {stored.max()} of {groups}", hint=_DAMAGED)
            group_of = stored
    share = 32 // bits

    def read(start: int, stop: int) -> Codes:
        low, high = start // share, -(-stop // share)
        words = source.read(zeros)[:, low:high]
        words = add_to_codes(words, bits, 1) if first_format else words
        unpacked = unpack_bytes(words, bits)[:, start - low * share : stop - low * share]
        return Codes(
            transposed_words(source.read(weight)[:, start:stop]),
            np.ascontiguousarray(source.read(scales)[:, start:stop].T),
            np.ascontiguousarray(unpacked.T),
        )

    info, dtype = _logical(layer, n, k), source.info(scales).dtype
    return Grouped(source, info, tensors, "gptq", bits, size, symmetric, dtype, group_of, read)


def awq(source: TensorSource, layer: str, *, group: int | None, symmetric: bool) -> Grouped:
    import numpy as np

    from coldpress.kernels.packed import awq_columns, awq_rows

    weight, zeros, scales = tensors = tuple(f"{layer}.{part}" for part in ("qweight", "qzeros", "scales"))
    groups, n = _matrix(source, scales)
    k, columns = _matrix(source, weight)
    _typed(source, {weight: ("int32",), zeros: ("int32",)})
    bits = _bits(layer, 32 * columns // n if n else 0, "awq", (4,))
    _expect(source, {weight: (k, n // 8), zeros: (groups, n // 8)})
    size = _group(layer, k, groups, group)

    def read(start: int, stop: int) -> Codes:
        low, high = start // 8, -(-stop // 8)
        rows = awq_rows(source.read(weight)[:, low:high])[start - 8 * low : stop - 8 * low]
        unpacked = awq_columns(source.read(zeros)[:, low:high])[:, start - 8 * low : stop - 8 * low]
        turned = np.ascontiguousarray(source.read(scales)[:, start:stop].T)
        return Codes(rows, turned, np.ascontiguousarray(unpacked.T))

    info, dtype = _logical(layer, n, k), source.info(scales).dtype
    return Grouped(source, info, tensors, "awq", bits, size, symmetric, dtype, None, read)


def packed_int32(source: TensorSource, layer: str, *, group: int | None, bits: tuple[int, ...]) -> Grouped:
    """compressed-tensors' pack-quantized. `bits`: what config.json speaks of; it may give layers different ones."""
    import numpy as np

    from coldpress.kernels.packed import unpack_bytes

    weight, scales, shape, zeros, index = (
        f"{layer}.weight_{part}" for part in ("packed", "scale", "shape", "zero_point", "g_idx")
    )
    _expect(source, {shape: (2,)})
    _typed(source, {weight: ("int32",), shape: ("int32", "int64")})
    n, k = (int(size) for size in source.read(shape))
    rows, words = _matrix(source, weight)
    fitting = [count for count in bits if -(-k * count // 32) == words]
    if rows != n or not fitting:
        raise CheckpointError(
            f"{weight} has shape {[rows, words]}, which is no matrix {[n, k]} of {', '.join(map(str, bits))} bits",
            hint=_DAMAGED,
        )
    width = _bits(layer, fitting[0], "compressed-tensors")
    groups = _matrix(source, scales)[1]
    _expect(source, {scales: (n, groups)})
    tensors = (weight, scales, shape, *(name for name in (zeros, index) if name in source))
    packed_zeros = zeros in source and source.info(zeros).dtype == "int32"
    if zeros in source:
        _typed(source, {zeros: ("int32", "int8")})
        _expect(source, {zeros: (-(-n * width // 32) if packed_zeros else n, groups)})
    group_of = np.asarray(source.read(index), np.int64) if index in source else None
    size = _group(layer, k, groups, group)
    if group_of is not None and np.array_equal(group_of, np.arange(k) // size):
        group_of = None
    share = 32 // width

    def read(start: int, stop: int) -> Codes:
        data = np.ascontiguousarray(source.read(weight, start, stop)).view(np.uint8)[:, : -(-k * width // 8)]
        found = None
        if packed_zeros:
            low = start // share
            turned = np.ascontiguousarray(source.read(zeros, low, -(-stop // share)).T)
            found = np.ascontiguousarray(unpack_bytes(turned, width)[:, start - low * share : stop - low * share].T)
        elif zeros in source:
            found = (source.read(zeros, start, stop).astype(np.int16) + (1 << (width - 1))).astype(np.uint8)
        return Codes(data, source.read(scales, start, stop), found)

    info, dtype = _logical(layer, n, k), source.info(scales).dtype
    symmetric = zeros not in source
    return Grouped(source, info, tensors, "compressed-tensors", width, size, symmetric, dtype, group_of, read)


def int8(source: TensorSource, layer: str, *, group: int | None) -> Grouped:
    """compressed-tensors' int-quantized: one code a byte, from -128."""
    import numpy as np

    weight, scales, zeros = (f"{layer}.{part}" for part in ("weight", "weight_scale", "weight_zero_point"))
    n, k = _matrix(source, weight)
    tensors = (weight, scales, *((zeros,) if zeros in source else ()))
    _typed(source, {name: ("int8",) for name in (weight, zeros) if name in source})
    stored = source.info(scales).shape
    single = math.prod(stored) == 1 and n > 1
    groups = 1 if single or len(stored) < 2 else stored[1]
    if not single and math.prod(stored) != n * groups:
        raise CheckpointError(f"{scales} has shape {list(stored)}, {weight} has {n} rows", hint=_DAMAGED)
    size = _group(layer, k, groups, group)

    def part(name: str, start: int, stop: int) -> Array:
        if single:
            return np.broadcast_to(source.read(name).reshape(1, 1), (stop - start, 1))
        return source.read(name, start, stop).reshape(stop - start, groups)

    def unsigned(codes: Array) -> Bytes:
        shifted: Bytes = np.ascontiguousarray(codes).view(np.uint8) ^ np.uint8(0x80)
        return shifted

    def read(start: int, stop: int) -> Codes:
        found = unsigned(part(zeros, start, stop)) if zeros in source else None
        return Codes(unsigned(source.read(weight, start, stop)), part(scales, start, stop), found)

    info, dtype = _logical(layer, n, k), source.info(scales).dtype
    symmetric = zeros not in source
    return Grouped(source, info, tensors, "compressed-tensors", 8, size, symmetric, dtype, None, read)


@dataclass(frozen=True)
class _Valued:
    """A matrix that is not made of integer codes."""

    info: TensorInfo
    tensors: tuple[str, ...]
    packing: str
    rows: Callable[[int, int], Floats] = field(repr=False, compare=False)


def float8(source: TensorSource, layer: str, scales: str, *, block: tuple[int, int] | None) -> StoredMatrix:
    """`scales`: the name of the scales, which multiply in spite of a name like weight_scale_inv."""
    import numpy as np

    from coldpress.kernels.packed import spread

    weight = f"{layer}.weight"
    n, k = _matrix(source, weight)
    shape = source.info(scales).shape
    if math.prod(shape) == 1:
        grid, block = (1, 1), (n, k)
    elif block is not None and shape == (-(-n // block[0]), -(-k // block[1])):
        grid = shape
    elif shape and shape[0] == n and len(shape) <= 2 and k % (math.prod(shape) // n) == 0:
        grid = (n, math.prod(shape) // n)
        block = (1, k // grid[1])
    else:
        blocks = f"blocks of {block[0]} x {block[1]}" if block else "no blocks"
        raise CheckpointError(
            f"{scales} of shape {list(shape)} does not fit {weight} of shape {[n, k]} with {blocks}", hint=_DAMAGED
        )
    fixed: tuple[int, int] = block

    def rows(start: int, stop: int) -> Floats:
        values = np.asarray(source.read(scales), np.float32).reshape(grid)
        result: Floats = source.read(weight, start, stop).astype(np.float32)
        result *= spread(values, fixed, start, stop - start, k)
        return result

    tensors = (weight, scales)
    return _Valued(_logical(layer, n, k), tensors, "fp8 values are no integer codes", rows)


def bitsandbytes_4bit(source: TensorSource, layer: str, state: str) -> StoredMatrix:
    """`state`: the name of the JSON that says what the other tensors mean."""
    import numpy as np

    from coldpress.kernels.packed import four_bit_values

    weight = f"{layer}.weight"
    try:
        record = json.loads(source.read(state).tobytes())
        n, k = (int(size) for size in record["shape"])
        block = int(record["blocksize"])
        nested = f"{weight}.nested_absmax" in source
        inner = int(record["nested_blocksize"]) if nested else 0
        offset = np.float32(record["nested_offset"]) if nested else np.float32(0)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{state} does not describe a 4-bit matrix: {error!r}", hint=_DAMAGED) from error
    maximum, map_ = f"{weight}.absmax", f"{weight}.quant_map"
    blocks = -(-n * k // block)
    parts = ("nested_absmax", "nested_quant_map") if nested else ()
    _typed(source, {weight: ("uint8",), **({maximum: ("uint8",)} if nested else {})})
    tensors = (weight, state, maximum, map_, *(f"{weight}.{part}" for part in parts))
    _expect(source, {map_: (16,), **({f"{weight}.nested_quant_map": (256,)} if nested else {})})
    stored = math.prod(source.info(weight).shape)
    if stored != -(-n * k // 2) or source.info(maximum).shape != (blocks,):
        raise CheckpointError(
            f"{weight} has {stored} bytes and {source.info(maximum).shape} blocks for a matrix {[n, k]} in blocks "
            f"of {block}",
            hint=_DAMAGED,
        )

    def rows(start: int, stop: int) -> Floats:
        first, last = start * k, stop * k
        low, high = first // block, -(-last // block)
        absmax = source.read(maximum, low, high)
        if nested:
            code, scales = source.read(f"{weight}.nested_quant_map"), source.read(f"{weight}.nested_absmax")
            absmax = code[absmax] * scales[np.arange(low, high) // inner] + offset
        data = source.read(weight, first // 2, -(-last // 2)).reshape(-1)
        values = four_bit_values(
            data, absmax.astype(np.float32), source.read(map_), first=first, count=last - first, block=block
        )
        return values.reshape(stop - start, k)

    info = _logical(layer, n, k)
    kind = state.rpartition("__")[2]
    return _Valued(info, tensors, f"{kind} values are no integer codes", rows)


def _matrix(source: TensorSource, name: str) -> tuple[int, int]:
    shape = source.info(name).shape
    if len(shape) != 2:
        raise CheckpointError(f"{name} must be a matrix, its shape is {list(shape)}", hint=_DAMAGED)
    return shape[0], shape[1]
