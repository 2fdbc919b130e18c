"""Matrices whose codes are taken from a quantized checkpoint as they are, bit for bit, instead of quantized here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from coldpress.artifacts.arch import Rows
from coldpress.artifacts.quantized import CodedSource
from coldpress.artifacts.stored import Packing
from coldpress.errors import CheckpointError
from coldpress.graph.weights import Array, Place
from coldpress.kernels.packed import in_blocks

__all__ = ["ColumnOrder", "TakenMatrix"]


@dataclass(frozen=True)
class TakenMatrix:
    """W [n, k] in the blocks in which the checkpoint has it, stacked from parts of equal packing.

    The tensors are those of `QuantizedMatrix`. Where the packing has an order, so do the columns here: the product must
    then be fed x[:, order].
    """

    name: str
    tensors: CodedSource
    parts: tuple[Rows, ...]
    k: int
    packing: Packing
    scale_dtype: ir.DataType

    @property
    def n(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def places(self) -> tuple[Place, ...]:
        bits, size = self.packing.bits, self.packing.block_size
        n, blocks = self.n, self.k // size
        codes = Place(f"{self.name}_Q{bits}", ir.DataType.UINT8, (n, blocks, size * bits // 8))
        scales = Place(f"{self.name}_scales", self.scale_dtype, (n, blocks))
        if self.packing.symmetric:
            return codes, scales
        return codes, scales, Place(f"{self.name}_zero_points", ir.DataType.UINT8, (n, -(-blocks * bits // 8)))

    @property
    def rows(self) -> int:
        return self.n

    @property
    def row_elements(self) -> int:
        return self.k

    def make(self, start: int, stop: int) -> tuple[Array, ...]:
        pieces, first = [], 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.count)
            if low < high:
                pieces.append(self._piece(part.tensor, part.first + low, part.first + high))
            first += part.count
        return tuple(np.concatenate(arrays) for arrays in zip(*pieces, strict=True))

    def _piece(self, tensor: str, start: int, stop: int) -> tuple[Array, ...]:
        found = self.tensors.codes(tensor, start, stop)
        with np.errstate(over="ignore"):
            scales = found.scales.astype(self.scale_dtype.numpy(), copy=False)
        if not np.isfinite(scales).all():
            row = start + int(np.nonzero(~np.isfinite(scales).all(axis=1))[0][0])
            raise CheckpointError(
                f"row {row} of {tensor} has a scale that is not finite in {self.scale_dtype.name.lower()}",
                hint="the checkpoint is damaged, or the graph's float type lacks the range: build with another one",
            )
        codes, scales, zeros = in_blocks(
            found.rows,
            scales,
            found.zeros,
            bits=self.packing.bits,
            k=self.k,
            group=self.packing.group,
            block_size=self.packing.block_size,
        )
        if self.packing.symmetric:
            return codes, scales
        if zeros is None:
            raise AssertionError(f"{tensor} is asymmetric and has no zero points")
        return codes, scales, zeros


@dataclass(frozen=True)
class ColumnOrder:
    """The columns of x as the codes of `tensor` want them: int64 [k]."""

    tensors: CodedSource
    tensor: str
    digest: str
    k: int

    @property
    def places(self) -> tuple[Place, ...]:
        return (Place(f"column_order_{self.digest}", ir.DataType.INT64, (self.k,)),)

    @property
    def rows(self) -> int:
        return self.k

    @property
    def row_elements(self) -> int:
        return 2

    def make(self, start: int, stop: int) -> tuple[Array, ...]:
        order = self.tensors.order(self.tensor)
        if order is None:
            raise AssertionError(f"{self.tensor} has no order of columns")
        return (order[start:stop],)
