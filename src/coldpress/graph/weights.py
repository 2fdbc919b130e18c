"""The weights of a graph: where each lies in the external data file, and how its bytes come about when it is written.

    checkpoint (memory map) -> rows -> cast | quantize | compute -> their place in model.onnx.data

A graph is built with placeholders that know dtype, shape and offset only (`DataFile.add`). `DataFile.write` then cuts
every weight into chunks of rows; each thread takes the next chunk, makes its bytes and writes them at their offset. So
peak memory is `budget_bytes`, whatever the size of a tensor, and one huge matrix keeps all threads busy. Nothing is
synced to the device here: whoever commits the folder does that.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from coldpress.artifacts.arch import Rope, Rows
from coldpress.artifacts.tensors import TensorSource, numpy_dtype
from coldpress.errors import CheckpointError, DiskFullError
from coldpress.graph.form import WRITE_BUDGET
from coldpress.kernels.quantize import NonFiniteWeightError, Quantized, quantize
from coldpress.kernels.rope import cos_sin, inverse_frequencies

__all__ = [
    "Cast",
    "DataFile",
    "Matrix",
    "Place",
    "QuantizedMatrix",
    "RopeTable",
    "RowSource",
    "Transposed",
    "Weight",
    "not_finite",
]

ALIGNMENT = 64
"""A cache line, and the width of an AVX-512 register: every tensor starts on a multiple of it."""
COPIES = 4
"""A chunk is held at most so many times over as float32: input, float32 form, result, result in its final dtype."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Matrix:
    """W [n, k] as rows of checkpoint tensors, stacked; a vector is a matrix with k = 1."""

    tensors: TensorSource
    parts: tuple[Rows, ...]
    k: int

    @property
    def n(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def name(self) -> str:
        return " + ".join(part.tensor for part in self.parts)

    @property
    def dtype(self) -> str:
        """Of the checkpoint; float32 where parts differ."""
        found = {self.tensors.info(part.tensor).dtype for part in self.parts}
        return found.pop() if len(found) == 1 else "float32"

    def rows(self, start: int, stop: int) -> Array:
        """Rows as they are stored; float32 where parts differ."""
        pieces, first = [], 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.count)
            if low < high:
                piece = self.tensors.read(part.tensor, part.first + low, part.first + high)
                pieces.append(piece.reshape(high - low, self.k))
            first += part.count
        if len(pieces) == 1:
            return pieces[0]
        dtype = numpy_dtype(self.dtype)
        return np.concatenate([piece.astype(dtype, copy=False) for piece in pieces])


class RowSource(Protocol):
    """Rows that a weight is made from: a `Matrix`, or the rows of a layer's experts."""

    @property
    def n(self) -> int: ...

    @property
    def k(self) -> int: ...

    @property
    def name(self) -> str: ...

    def rows(self, start: int, stop: int) -> Array: ...


@dataclass(frozen=True)
class Place:
    """A tensor of the data file."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return -(-int(np.prod(self.shape, dtype=np.int64)) * self.dtype.bitwidth // 8)

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.shape[0]

    def tensor(self, file: str) -> ir.ExternalTensor:
        return ir.ExternalTensor(file, self.offset, self.nbytes, self.dtype, shape=ir.Shape(self.shape), name=self.name)


class Weight(Protocol):
    """One or more tensors that are made together, row by row of the first axis that all of them share."""

    @property
    def places(self) -> tuple[Place, ...]:
        """Offsets are not yet known."""
        ...

    @property
    def rows(self) -> int: ...

    @property
    def row_elements(self) -> int:
        """Elements of input that a row takes: what the memory budget counts."""
        ...

    def make(self, start: int, stop: int) -> tuple[Array, ...]:
        """The rows of each place."""
        ...


def not_finite(name: str, row: int) -> CheckpointError:
    """What is raised for a weight that is NaN or infinite."""
    return CheckpointError(
        f"row {row} of {name} holds NaN or infinity", hint="the checkpoint is damaged, or its training diverged"
    )


def _float_cast(array: Array, dtype: ir.DataType, name: str, first: int = 0) -> Array:
    """To float32, float16 or bfloat16. NaN, infinity and a value beyond the type's range are errors.

    `first`: where the first row of `array` lies in the tensor `name`.
    """
    target = dtype.numpy()
    with np.errstate(over="ignore"):
        result = array.astype(target, copy=False)
    if np.isfinite(result).all():
        return result
    odd = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
    if odd.size:
        raise not_finite(name, first + int(odd[0]))
    raise CheckpointError(
        f"{name} holds values that {target.name} cannot (beyond {float(ml_dtypes.finfo(target).max):.6g})",
        hint="build with another precision: bf16 and fp32 have the range",
    )


@dataclass(frozen=True)
class Cast:
    """A matrix or vector in another floating-point type, shape [n, k] or [n]."""

    name: str
    matrix: RowSource
    dtype: ir.DataType
    vector: bool = False
    add: float = 0.0
    """Added to each number, in float32."""

    @property
    def places(self) -> tuple[Place, ...]:
        shape = (self.matrix.n,) if self.vector else (self.matrix.n, self.matrix.k)
        return (Place(self.name, self.dtype, shape),)

    @property
    def rows(self) -> int:
        return self.matrix.n

    @property
    def row_elements(self) -> int:
        return self.matrix.k

    def make(self, start: int, stop: int) -> tuple[Array, ...]:
        rows = self.matrix.rows(start, stop)
        if self.add:
            rows = rows.astype(np.float32) + np.float32(self.add)
        return (_float_cast(rows[:, 0] if self.vector else rows, self.dtype, self.matrix.name, start),)


@dataclass(frozen=True)
class Transposed:
    """W^T [k, n], as ONNX MatMul wants it. A chunk reads a stripe of columns over all rows."""

    name: str
    matrix: Matrix
    dtype: ir.DataType

    @property
    def places(self) -> tuple[Place, ...]:
        return (Place(self.name, self.dtype, (self.matrix.k, self.matrix.n)),)

    @property
    def rows(self) -> int:
        return self.matrix.k

    @property
    def row_elements(self) -> int:
        return self.matrix.n

    def make(self, start: int, stop: int) -> tuple[Array, ...]:
        # A stripe is gathered from pieces of rows, so that an adapter is never added to the whole matrix at once.
        result = np.empty((stop - start, self.matrix.n), self.dtype.numpy())
        step = max(1, (1 << 20) // self.matrix.k)
        for first in range(0, self.matrix.n, step):
            last = min(first + step, self.matrix.n)
            stripe = self.matrix.rows(first, last)[:, start:stop]
            result[:, first:last] = _float_cast(stripe, self.dtype, self.matrix.name, first).T
        return (result,)


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix in blocks of 4 or 8 bits; tensors `name`_Q4, `name`_scales and, if asymmetric, `name`_zero_points.

    Zero points are packed like codes, or floats where they are `half_quadratic`.
    """

    name: str
    matrix: RowSource
    bits: int
    block_size: int
    symmetric: bool
    candidates: int
    scale_dtype: ir.DataType
    half_quadratic: bool = False

    @property
    def blocks(self) -> int:
        return -(-self.matrix.k // self.block_size)

    @property
    def places(self) -> tuple[Place, ...]:
        n, blocks = self.matrix.n, self.blocks
        codes = Place(f"{self.name}_Q{self.bits}", ir.DataType.UINT8, (n, blocks, self.block_size * self.bits // 8))
        scales = Place(f"{self.name}_scales", self.scale_dtype, (n, blocks))
        if self.symmetric:
            return codes, scales
        if self.half_quadratic:
            return codes, scales, Place(f"{self.name}_zero_points", self.scale_dtype, (n, blocks))
        return codes, scales, Place(f"{self.name}_zero_points", ir.DataType.UINT8, (n, -(-blocks * self.bits // 8)))

    @property
    def rows(self) -> int:
        return self.matrix.n

    @property
    def row_elements(self) -> int:
        return self.matrix.k

    def make(self, start: int, stop: int) -> tuple[Array, ...]:
        return self.make_blocks(start, stop, 0, self.blocks)

    def make_blocks(self, start: int, stop: int, low: int, high: int) -> tuple[Array, ...]:
        """Blocks `low` to `high` of the rows."""
        weights = self.matrix.rows(start, stop)[:, low * self.block_size : high * self.block_size]
        try:
            result = self._quantized(weights)
        except NonFiniteWeightError as error:
            raise not_finite(self.matrix.name, start + error.row) from error
        scales = _float_cast(result.scales, self.scale_dtype, f"scales of {self.matrix.name}")
        if result.zeros is None:
            return result.codes, scales
        if self.half_quadratic:
            return result.codes, scales, result.zeros.astype(self.scale_dtype.numpy(), copy=False)
        return result.codes, scales, result.zeros

    def _quantized(self, weights: Array) -> Quantized:
        if self.half_quadratic:
            from coldpress.kernels.hqq import quantize_half_quadratic

            return quantize_half_quadratic(weights, bits=self.bits, block_size=self.block_size)
        return quantize(
            weights,
            bits=self.bits,
            block_size=self.block_size,
            symmetric=self.symmetric,
            candidates=self.candidates,
        )


@dataclass(frozen=True)
class RopeTable:
    """cos and sin of every position, [positions, d/2]. longrope: the short table, then the long one, where `both`."""

    name: str
    rope: Rope
    lengths: tuple[tuple[tuple[float, ...], int], ...]
    """Tables to stack: divisors of the frequencies (empty but for longrope) and positions."""
    dtype: ir.DataType

    @property
    def places(self) -> tuple[Place, ...]:
        shape = (self.rows, self.rope.dim // 2)
        return Place(f"cos_{self.name}", self.dtype, shape), Place(f"sin_{self.name}", self.dtype, shape)

    @property
    def rows(self) -> int:
        return sum(length for _, length in self.lengths)

    @property
    def row_elements(self) -> int:
        return self.rope.dim

    def make(self, start: int, stop: int) -> tuple[Array, ...]:
        pieces, first = [], 0
        for factors, length in self.lengths:
            low, high = max(start - first, 0), min(stop - first, length)
            if low < high:
                extra = {"factors": factors} if factors else {}
                frequencies, scale = inverse_frequencies(
                    self.rope.kind, self.rope.dim, self.rope.theta, **self.rope.parameters, **extra
                )
                pieces.append(cos_sin(frequencies, scale, low, high))
            first += length
        cos, sin = (np.concatenate(halves) for halves in zip(*pieces, strict=True))
        return cos.astype(self.dtype.numpy(), copy=False), sin.astype(self.dtype.numpy(), copy=False)


class DataFile:
    """The external data of a model: weights are added while the graph is built, written once it is complete."""

    def __init__(self, name: str = "model.onnx.data") -> None:
        self.name = name
        self.size = 0
        self._weights: list[tuple[Weight, tuple[Place, ...]]] = []
        self._known: dict[str, tuple[Weight, tuple[Place, ...]]] = {}

    def add(self, weight: Weight) -> tuple[Place, ...]:
        """Give the tensors of a weight their offsets; one that was added before keeps those it has."""
        known = self._known.get(weight.places[0].name)
        if known is not None and known[0] == weight:
            return known[1]
        placed = []
        for place in weight.places:
            offset = -(-self.size // ALIGNMENT) * ALIGNMENT
            placed.append(Place(place.name, place.dtype, place.shape, offset))
            self.size = offset + place.nbytes
        self._weights.append((weight, tuple(placed)))
        self._known[placed[0].name] = (weight, tuple(placed))
        return tuple(placed)

    def write(
        self,
        folder: Path,
        *,
        threads: int,
        budget_bytes: int = WRITE_BUDGET,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write all tensors into `folder`; `progress` gets bytes done and bytes in all, one call at a time.

        The first error of any thread stops all and is raised; a full disk as DiskFullError.
        """
        path = folder / self.name
        elements = max(1, budget_bytes // (threads * COPIES * 4))
        chunks = self._chunks(elements)
        lock, stop, written = threading.Lock(), threading.Event(), 0

        def work() -> None:
            nonlocal written
            with path.open("r+b", buffering=0) as file:
                while not stop.is_set():
                    with lock:
                        chunk = next(chunks, None)
                    if chunk is None:
                        return
                    count = _write_chunk(file, *chunk)
                    with lock:
                        written += count
                        if progress is not None:
                            progress(written, self.size)

        def guarded() -> None:
            try:
                work()
            except BaseException:
                stop.set()
                raise

        try:
            with path.open("wb") as file:
                file.truncate(self.size)
            with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
                for future in [pool.submit(guarded) for _ in range(threads)]:
                    future.result()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DiskFullError(f"no space left for {path}: it takes {self.size} bytes") from error
            raise

    def _chunks(self, elements: int) -> Iterator[tuple[Weight, tuple[Place, ...], int, int]]:
        for weight, places in self._weights:
            step = max(1, elements // weight.row_elements)
            for start in range(0, weight.rows, step):
                yield weight, places, start, min(start + step, weight.rows)


def _write_chunk(file: Any, weight: Weight, places: tuple[Place, ...], start: int, stop: int) -> int:
    """Make rows and write them; returns the bytes written."""
    total = 0
    for place, array in zip(places, weight.make(start, stop), strict=True):
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        if len(data) != (stop - start) * place.row_bytes:
            raise AssertionError(f"{place.name}: {len(data)} bytes made for {(stop - start) * place.row_bytes}")
        file.seek(place.offset + start * place.row_bytes)
        total += len(data)
        while data:
            data = data[file.write(data) :]
    return total
