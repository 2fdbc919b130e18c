"""Matrix products in int8 whose activations are scaled token by token: for prompts, where arithmetic sets the pace.

    x [B, S, k]    p [B, S, 1]  greatest |x| of each token        W [n, k] ~ codes * scales, int8 [n, k], float32 [n]
    q [B*S, k]     uint8(round(127 x / p) + 128)
    y = p / 127 * ((q - 128) codes^T) * scales                    com.microsoft.QGemm, times p

QuantizeLinear with one scale for all tokens would let one with outliers take the bits of the others. And as nothing is
measured over more than a token, the result does not depend on what else is in a batch.

Unsigned activations and signed weights are the pair that AMX and VNNI multiply, several times faster than MatMulNBits
does; uint8 weights are no faster than that. On older x86 CPUs ONNX Runtime adds pairs of such products in 16 bits,
which can saturate. Before 1.25 it had a wrong kernel for AMX (onnxruntime pull request 27671).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from coldpress.graph.ops import MICROSOFT, GraphWriter
from coldpress.graph.weights import Array, Matrix, Place, not_finite
from coldpress.kernels.quantize import NonFiniteWeightError, quantize_rows

__all__ = ["Int8Matrix", "Int8Tokens"]

_STEPS = 127
_LEAST = 1e-30
"""Activations below it become zeros; a token that is all zeros is not divided by zero."""


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix in int8 with a scale for each of its rows; tensors `name`_int8 and `name`_int8_scales."""

    name: str
    matrix: Matrix

    @property
    def places(self) -> tuple[Place, ...]:
        n, k = self.matrix.n, self.matrix.k
        codes = Place(f"{self.name}_int8", ir.DataType.INT8, (n, k))
        return codes, Place(f"{self.name}_int8_scales", ir.DataType.FLOAT, (n,))

    @property
    def rows(self) -> int:
        return self.matrix.n

    @property
    def row_elements(self) -> int:
        return self.matrix.k

    def make(self, start: int, stop: int) -> tuple[Array, ...]:
        try:
            return quantize_rows(self.matrix.rows(start, stop))
        except NonFiniteWeightError as error:
            raise not_finite(self.matrix.name, start + error.row) from error


@dataclass(frozen=True)
class _Tokens:
    """Activations as a product reads them."""

    codes: ir.Value
    peak: ir.Value
    shape: ir.Value
    """B and S."""


class Int8Tokens:
    """Writes the products of one graph; those of the same activations quantize them once."""

    def __init__(self, graph: GraphWriter) -> None:
        self.graph = graph
        self._known: dict[ir.Value, _Tokens] = {}
        self._zeros: dict[int, ir.Value] = {}
        """Zero points of the weights, by how many: QGemm wants one for each scale."""

    def product(self, name: str, x: ir.Value, weight: Int8Matrix) -> ir.Value:
        graph, base = self.graph, name.removesuffix("/MatMul")
        n, k = weight.matrix.n, weight.matrix.k
        if x not in self._known:
            self._known[x] = self._quantized(f"{base}/tokens", x, k)
        tokens = self._known[x]
        codes, scales = graph.weight(weight)
        step = graph.constant(1 / _STEPS, np.float32)
        if n not in self._zeros:
            zero = ir.tensor(np.zeros(1, np.int8))
            name_of = f"/constants/int8/zeros_{n}"
            self._zeros[n] = graph.op("ConstantOfShape", [graph.constant([n])], name=name_of, value=zero)
        flat = graph.op(
            "QGemm",
            [tokens.codes, step, graph.constant(_STEPS + 1, np.uint8), codes, scales, self._zeros[n]],
            name=name,
            domain=MICROSOFT,
            transB=1,
        )
        shape = graph.op("Concat", [tokens.shape, graph.constant([n])], name=f"{base}/tokens/Concat", axis=0)
        apart = graph.op("Reshape", [flat, shape], name=f"{base}/tokens/Reshape_2")
        return graph.op("Mul", [apart, tokens.peak], name=f"{base}/tokens/Mul")

    def _quantized(self, base: str, x: ir.Value, k: int) -> _Tokens:
        graph = self.graph
        magnitude = graph.op("Abs", [x], name=f"{base}/Abs")
        greatest = graph.op("ReduceMax", [magnitude, graph.constant([-1])], name=f"{base}/ReduceMax", keepdims=1)
        peak = graph.op("Max", [greatest, graph.constant(_LEAST, np.float32)], name=f"{base}/Max")
        scaled = graph.op("Div", [x, peak], name=f"{base}/Div")
        step, zero = graph.constant(1 / _STEPS, np.float32), graph.constant(_STEPS + 1, np.uint8)
        codes = graph.op("QuantizeLinear", [scaled, step, zero], name=f"{base}/QuantizeLinear")
        flat = graph.op("Reshape", [codes, graph.constant([-1, k])], name=f"{base}/Reshape")
        return _Tokens(flat, peak, graph.op("Shape", [x], name=f"{base}/Shape", start=0, end=2))
