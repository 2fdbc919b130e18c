"""Blocks of 4 or 8 bits that a product reads through the standard operators: DequantizeLinear (opset 21) and MatMul.

    W [n, k] in blocks of g along k, b blocks to a row -> codes [k, n], scales [b, n], zero points [b, n]

MatMul multiplies with W^T, so the blocks lie along the first axis, and everything is the transposed form of what
MatMulNBits reads. ONNX Runtime makes MatMulNBits of the two nodes when it loads the graph (DQMatMulToMatMulNBits in
onnxruntime/core/optimizer/qdq_transformer/selectors_actions; seen for 1.32 at 4 and 8 bits, blocks 16 to 128, ragged
rows), others run them as they stand. Symmetric codes are signed and need no zero points, asymmetric ones are unsigned.
The codes are those of `QuantizedMatrix` and `TakenMatrix`, number for number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from coldpress.graph.ops import GraphWriter
from coldpress.graph.taken import TakenMatrix
from coldpress.graph.weights import Array, Place, QuantizedMatrix
from coldpress.kernels.quantize import unpack

__all__ = ["BlocksTransposed", "dequantized"]

_TYPES = {
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
}
_STRIPE = 1 << 20
"""Weights that are quantized at a time."""


def dequantized(graph: GraphWriter, matrix: QuantizedMatrix | TakenMatrix, block_size: int, name: str) -> ir.Value:
    """W^T [k, n] of the node `name`, as floats."""
    blocks = BlocksTransposed(matrix, block_size)
    inputs = [graph.place(place) for place in blocks.typed(graph.data.add(blocks))]
    node = name.removesuffix("MatMul") + "DequantizeLinear"
    return graph.op("DequantizeLinear", inputs, name=node, axis=0, block_size=block_size)


@dataclass(frozen=True)
class BlocksTransposed:
    """A quantized matrix as DequantizeLinear reads it along axis 0.

    Row i of the weight is the i-th block of every row of W: i to i + 1 blocks down, all n across. Where n is odd it is
    two blocks, as two 4-bit numbers of one byte would otherwise belong to different rows. A chunk takes a stripe of
    columns of W over all its rows, quantized piece by piece.
    """

    matrix: QuantizedMatrix | TakenMatrix
    block_size: int

    @property
    def bits(self) -> int:
        return self.matrix.bits if isinstance(self.matrix, QuantizedMatrix) else self.matrix.packing.bits

    @property
    def symmetric(self) -> bool:
        return self.matrix.symmetric if isinstance(self.matrix, QuantizedMatrix) else self.matrix.packing.symmetric

    @property
    def n(self) -> int:
        return self.matrix.rows

    @property
    def k(self) -> int:
        return self.matrix.row_elements

    @property
    def blocks(self) -> int:
        return -(-self.k // self.block_size)

    @property
    def _step(self) -> int:
        """Blocks to a row."""
        return 1 + self.n % 2

    @property
    def rows(self) -> int:
        return -(-self.blocks // self._step)

    @property
    def row_elements(self) -> int:
        # A code takes a byte while it is moved, and another while it is packed; a budget counts 16 bytes an element.
        return max(1, self._step * self.block_size * self.n // 4)

    @property
    def places(self) -> tuple[Place, ...]:
        """As bytes, in whole rows; `typed` says what they are."""
        name, rows, across = self.matrix.name, self.rows, self._step * self.n
        codes = Place(f"{name}_DQ{self.bits}", ir.DataType.UINT8, (rows, self.block_size * across * self.bits // 8))
        scales = Place(f"{name}_DQ_scales", self.matrix.scale_dtype, (rows, across))
        if self.symmetric:
            return codes, scales
        return codes, scales, Place(f"{name}_DQ_zero_points", ir.DataType.UINT8, (rows, across * self.bits // 8))

    def typed(self, places: tuple[Place, ...]) -> tuple[Place, ...]:
        """The same bytes with the types and dims that the operator wants."""
        kind, (codes, scales, *zeros) = _TYPES[self.bits, self.symmetric], places
        wide = (self.blocks, self.n)
        return (
            Place(codes.name, kind, (self.k, self.n), codes.offset),
            Place(scales.name, scales.dtype, wide, scales.offset),
            *(Place(one.name, kind, wide, one.offset) for one in zeros),
        )

    def make(self, start: int, stop: int) -> tuple[Array, ...]:
        rows, low, high = stop - start, start * self._step, min(stop * self._step, self.blocks)
        codes = np.zeros((rows * self._step, self.block_size, self.n), np.uint8)
        scales = np.zeros((rows * self._step, self.n), self.matrix.scale_dtype.numpy())
        zeros = np.zeros((rows * self._step, self.n), np.uint8)
        for first, last, piece in self._pieces(low, high):
            codes[: high - low, :, first:last] = unpack(piece[0], self.bits).transpose(1, 2, 0)
            scales[: high - low, first:last] = piece[1].T
            if not self.symmetric:
                zeros[: high - low, first:last] = piece[2].T
        if self.symmetric:
            codes -= np.uint8(1 << (self.bits - 1))
            return self._packed(codes, rows), scales.reshape(rows, -1)
        return self._packed(codes, rows), scales.reshape(rows, -1), self._packed(zeros, rows)

    def _pieces(self, low: int, high: int) -> Iterator[tuple[int, int, tuple[Array, ...]]]:
        """Rows of W with their blocks from `low` to `high`: codes as they are packed, scales, zero points unpacked."""
        step = max(1, _STRIPE // self.k)
        for first in range(0, self.n, step):
            last = min(first + step, self.n)
            if isinstance(self.matrix, QuantizedMatrix):
                codes, scales, *zeros = self.matrix.make_blocks(first, last, low, high)
                yield first, last, (codes, scales, *(unpack(one, self.bits)[:, : high - low] for one in zeros))
            else:
                codes, scales, *zeros = (one[:, low:high] for one in self._taken(first, last))
                yield first, last, (codes, scales, *zeros)

    def _taken(self, first: int, last: int) -> tuple[Array, ...]:
        codes, scales, *zeros = self.matrix.make(first, last)
        return codes, scales, *(unpack(one, self.bits) for one in zeros)

    def _packed(self, numbers: Array, rows: int) -> Array:
        """ONNX packs two 4-bit numbers to a byte, the first in the low half."""
        flat = numbers.reshape(rows, -1)
        if self.bits == 8:
            return flat
        packed: Array = flat[:, 1::2] << np.uint8(4)
        packed |= flat[:, 0::2] & np.uint8(15)
        return packed
