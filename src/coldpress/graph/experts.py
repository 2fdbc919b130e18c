"""Mixtures of experts: the router, and one node that holds all experts of a layer.

    x [B, S, H] -> router -> scores [B*S, E] --.
    x -------------------------------------> MoE | QMoE -> [B, S, H]

    E experts, k of them for a token; H hidden size, I inner size of an expert
    gate_up  [E, 2I, H], row 2i is gate i and row 2i+1 is up i       down  [E, H, I]
    codes    [E, n, K * bits / 8]: as in `kernels.quantize`, but rows are not filled up to whole blocks
    scales   [E, n, ceil(K / block)]; zero points [E, n, ceil(ceil(K / block) * bits / 8)]

Only the experts that a token is sent to are computed. Seen of ONNX Runtime 1.32 on the CPU, against NumPy: gate and up
must be interleaved; both nodes take scores, not probabilities; MoE knows a softmax over all experts and over the chosen
ones, QMoE the second alone, and takes the first as another input; blocks need not divide K (QMoE then dequantizes at
every step); at 8 bits activations are int8 whatever the accuracy level; both projections of a layer have the same bits.
Operators: onnxruntime/docs/ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from coldpress.artifacts.arch import Arch, Rows
from coldpress.artifacts.stored_experts import turned
from coldpress.artifacts.tensors import TensorSource
from coldpress.graph.form import Form, Quantization
from coldpress.graph.linear import LinearWriter
from coldpress.graph.ops import FLOATS, MICROSOFT
from coldpress.graph.weights import Cast, Matrix, Place, QuantizedMatrix, RowSource, Weight

__all__ = ["ExpertWriter", "NamedExperts", "QuantizedExperts", "TurnedExperts"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class NamedExperts:
    """Experts that have matrices of their own, one below the other; rows of several matrices come in turn."""

    tensors: TensorSource
    names: tuple[str, ...]
    """`{}` is the number of the expert."""
    experts: int
    each: int
    """Rows of a matrix."""
    k: int

    @property
    def n(self) -> int:
        return self.experts * len(self.names) * self.each

    @property
    def name(self) -> str:
        return " and ".join(name.format("*") for name in self.names)

    def rows(self, start: int, stop: int) -> Array:
        ways = len(self.names)
        share, pieces = ways * self.each, []
        for expert in range(start // share, -(-stop // share)):
            low, high = max(start - expert * share, 0), min(stop - expert * share, share)
            first, last = low // ways, -(-high // ways)
            parts = [self.tensors.read(name.format(expert), first, last) for name in self.names]
            turns = np.stack(_alike(parts), axis=1).reshape(-1, self.k)
            pieces.append(turns[low - ways * first : high - ways * first])
        return np.concatenate(_alike(pieces)) if len(pieces) > 1 else pieces[0]


@dataclass(frozen=True)
class TurnedExperts:
    """Experts in one tensor [experts, k, n]: its columns are our rows. Reads one stripe of an expert at a time."""

    tensors: TensorSource
    name: str
    experts: int
    each: int
    """Columns of an expert."""
    k: int

    @property
    def n(self) -> int:
        return self.experts * self.each

    def rows(self, start: int, stop: int) -> Array:
        pieces = []
        for expert in range(start // self.each, -(-stop // self.each)):
            low, high = max(start - expert * self.each, 0), min(stop - expert * self.each, self.each)
            pieces.append(self.tensors.read(self.name, expert, expert + 1)[0, :, low:high].T)
        return np.concatenate(pieces)


def _alike(arrays: list[Array]) -> list[Array]:
    """In float32 where their types differ."""
    if len({array.dtype for array in arrays}) == 1:
        return arrays
    return [array.astype(np.float32) for array in arrays]


@dataclass(frozen=True)
class QuantizedExperts:
    """A quantized matrix whose rows are not filled up to whole blocks; its tensors are those of `QuantizedMatrix`."""

    inner: QuantizedMatrix

    @property
    def places(self) -> tuple[Place, ...]:
        codes, *rest = self.inner.places
        return (Place(codes.name, codes.dtype, (codes.shape[0], self._bytes)), *rest)

    @property
    def rows(self) -> int:
        return self.inner.rows

    @property
    def row_elements(self) -> int:
        return self.inner.row_elements

    @property
    def _bytes(self) -> int:
        return self.inner.matrix.k * self.inner.bits // 8

    def make(self, start: int, stop: int) -> tuple[Array, ...]:
        codes, *rest = self.inner.make(start, stop)
        return (codes.reshape(stop - start, -1)[:, : self._bytes], *rest)


class ExpertWriter:
    """Writes the experts of a layer."""

    def __init__(self, arch: Arch, form: Form, tensors: TensorSource, linear: LinearWriter) -> None:
        self.arch, self.form, self.tensors, self.linear = arch, form, tensors, linear
        self.graph, self.io = linear.graph, FLOATS[form.io]

    def write(self, layer: int, x: ir.Value) -> ir.Value:
        """The experts' outputs [B, S, H], weighted and added up."""
        (_, mixture), graph, base = self.arch.experts, self.graph, f"/model/layers.{layer}/moe"
        scores = graph.op(
            "Reshape",
            [self.linear.product(f"{base}/router/MatMul", x), graph.constant([-1, mixture.experts])],
            name=f"{base}/router/Reshape",
        )
        settings: dict[str, Any] = {
            "k": mixture.top_k,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": mixture.alpha,
            "activation_beta": mixture.beta,
            "normalize_routing_weights": int(mixture.normalized),
            "use_sparse_mixer": 0,
            **({} if mixture.limit is None else {"swiglu_limit": mixture.limit}),
        }
        gate_up, down = (self._matrix(layer, which) for which in ("gate_up", "down"))
        biases = [self._bias(layer, which) for which in ("gate_up", "down")]
        q = self.form.nodes.get(f"{base}/QMoE")
        if q is None:
            weights = [
                self._weight(Cast(self._tensor(layer, which) + ".weight", matrix, self.io))[0]
                for which, matrix in (("gate_up", gate_up), ("down", down))
            ]
            inputs = [x, scores, weights[0], biases[0], weights[1], biases[1]]
            return graph.op("MoE", _trimmed(inputs), name=f"{base}/MoE", domain=MICROSOFT, **settings)
        first, second = (
            self._weight(QuantizedExperts(self._quantized(f"{self._tensor(layer, which)}.weight", matrix, q)))
            for which, matrix in (("gate_up", gate_up), ("down", down))
        )
        chances = None
        if not mixture.normalized:
            chances = graph.op("Softmax", [scores], name=f"{base}/router/Softmax", axis=-1)
        zeros = [values[2] if len(values) > 2 else None for values in (first, second)]
        inputs = [x, scores, *first[:2], biases[0], *second[:2], biases[1], None, None, None, *zeros, None, chances]
        return graph.op(
            "QMoE",
            _trimmed(inputs),
            name=f"{base}/QMoE",
            domain=MICROSOFT,
            expert_weight_bits=q.bits,
            block_size=q.block_size,
            accuracy_level=q.accuracy_level,
            weights_prepacked=0,  # rows as they are; CUDA takes them for its own layout otherwise
            **settings,
        )

    def _quantized(self, name: str, matrix: RowSource, q: Quantization) -> QuantizedMatrix:
        candidates = q.candidates if q.bits == 4 else 1
        return QuantizedMatrix(name, matrix, q.bits, q.block_size, q.symmetric, candidates, self.io)

    def _weight(self, weight: Weight) -> list[ir.Value]:
        """Tensors [E * n, ...] of the data file, as [E, n, ...]."""
        count = self.arch.experts[1].experts
        return [
            self.graph.place(
                Place(place.name, place.dtype, (count, place.shape[0] // count, *place.shape[1:]), place.offset)
            )
            for place in self.graph.data.add(weight)
        ]

    def _matrix(self, layer: int, which: str) -> RowSource:
        """All experts' rows, gate and up in turn."""
        names, mixture = self.arch.experts
        own = names.gate_up if which == "gate_up" else (names.down,)
        full = tuple(f"{self.arch.family.names.layer.format(layer)}.{name}" for name in own)
        sizes = (mixture.inner, self.arch.hidden)
        k, n = sizes[::-1] if which == "gate_up" else sizes
        if len(names.gate_up) > 1:
            return NamedExperts(self.tensors, tuple(f"{name}.weight" for name in full), mixture.experts, n, k)
        each = 2 * n if which == "gate_up" else n
        if turned(full[0]) in self.tensors:
            return Matrix(self.tensors, (Rows(turned(full[0]), 0, mixture.experts * each),), k)
        return TurnedExperts(self.tensors, full[0], mixture.experts, each, k)

    def _bias(self, layer: int, which: str) -> ir.Value | None:
        """[E, n]."""
        names, mixture = self.arch.experts
        if not names.bias:
            return None
        own = names.gate_up[0] if which == "gate_up" else names.down
        tensor = f"{self.arch.family.names.layer.format(layer)}.{own}_bias"
        n = 2 * mixture.inner if which == "gate_up" else self.arch.hidden
        matrix = Matrix(self.tensors, (Rows(tensor, 0, mixture.experts),), n)
        return self.graph.weight(Cast(f"{self._tensor(layer, which)}.bias", matrix, self.io))[0]

    def _tensor(self, layer: int, which: str) -> str:
        return f"model.layers.{layer}.moe.experts.{which}_proj"


def _trimmed(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    """Without the absent ones at the end."""
    while inputs[-1] is None:
        inputs.pop()
    return inputs
