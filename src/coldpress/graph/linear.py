"""Matrix products, vectors and the embedding of a decoder: each as floats, or in blocks of 4 or 8 bits.

x [B, S, k] -> x W^T + b [B, S, n]        floats: MatMul       blocks: com.microsoft.MatMulNBits, or `int8_tokens`
ids [B, S]  -> rows [B, S, hidden]        floats: Gather       blocks: com.microsoft.GatherBlockQuantized
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import onnx_ir as ir

from coldpress.artifacts.arch import Arch, Linear, Rows
from coldpress.artifacts.quantized import CodedSource
from coldpress.artifacts.stored import Packing
from coldpress.artifacts.tensors import TensorSource
from coldpress.graph.form import EMBEDDING, HEAD, Form, Quantization, products, routers
from coldpress.graph.int8_tokens import Int8Matrix, Int8Tokens
from coldpress.graph.lora import LoraInputs
from coldpress.graph.ops import FLOATS, MICROSOFT, GraphWriter
from coldpress.graph.qdq import dequantized
from coldpress.graph.taken import ColumnOrder, TakenMatrix
from coldpress.graph.weights import Cast, Matrix, Place, QuantizedMatrix, Transposed, Weight

__all__ = ["LinearWriter"]


class LinearWriter:
    """Writes nodes that read weights of a checkpoint."""

    def __init__(self, arch: Arch, form: Form, tensors: TensorSource, graph: GraphWriter) -> None:
        self.arch, self.form, self.tensors, self.graph = arch, form, tensors, graph
        self.io = FLOATS[form.io]
        self.products = dict((*products(arch, form), *routers(arch)))
        self.lora = LoraInputs(form.lora_modules, tensors, graph, self.io)
        self.int8 = Int8Tokens(graph)
        self._orders: dict[str, ir.Value] = {}
        """Orders of columns by their digest."""
        self._shared: tuple[Place, ...] = ()
        """The matrix that embedding and head share."""
        if form.shares_embedding(arch):
            self._shared = graph.data.add(self._head_weight())

    def vector(self, name: str, parts: Sequence[Rows], *, add: float = 0.0) -> ir.Value:
        """A norm weight or a bias, stacked from its parts; `add` is added to each number."""
        return self.graph.weight(Cast(name, Matrix(self.tensors, tuple(parts), 1), self.io, vector=True, add=add))[0]

    def product(self, name: str, x: ir.Value) -> ir.Value:
        """x W^T, and + b where the layer has a bias, and what adapters add."""
        linear, q = self.products[name], self.form.nodes.get(name)
        shared = self._shared if name == HEAD else ()
        if q is not None and self.form.int8_tokens and name != HEAD:
            y = self.int8.product(name, x, Int8Matrix(_tensor_name(name), self._matrix(linear)))
        elif q is not None and self.form.qdq:
            fed = x if q.taken is None else self._ordered(name, linear, x, q.taken)
            w = dequantized(self.graph, self._quantized(name, linear, q), q.block_size, name)
            y = self.graph.op("MatMul", [fed, w], name=name)
        elif q is not None:
            values = (
                tuple(map(self.graph.place, shared)) if shared else self.graph.weight(self._quantized(name, linear, q))
            )
            fed = x if q.taken is None else self._ordered(name, linear, x, q.taken)
            y = self.graph.op(
                "MatMulNBits",
                [fed, *values],
                name=name,
                domain=MICROSOFT,
                K=linear.k,
                N=linear.n,
                bits=q.bits,
                block_size=q.block_size,
                accuracy_level=q.accuracy_level,
            )
        elif shared:
            # One set of bytes for both: the product reads the embedding as it lies, [vocab, hidden].
            y = self.graph.op("FusedMatMul", [x, self._shared_embedding()], name=name, domain=MICROSOFT, transB=1)
        else:
            (w,) = self.graph.weight(Transposed(_tensor_name(name), self._matrix(linear), self.io))
            y = self.graph.op("MatMul", [x, w], name=name)
        if linear.bias:
            add = name.removesuffix("MatMul") + "Add"
            y = self.graph.op("Add", [y, self.vector(_tensor_name(add, "bias"), linear.bias)], name=add)
        return self.lora.added(name, linear, x, y)

    def embed(self, ids: ir.Value) -> ir.Value:
        """Rows of the embedding."""
        arch, q = self.arch, self.form.nodes.get(EMBEDDING)
        rows = Linear((Rows(arch.embedding, 0, arch.vocab),), arch.hidden)
        if q is not None:
            return self._embed_quantized(ids, rows, q)
        if self._shared:
            table = self._shared_embedding()
        else:
            (table,) = self.graph.weight(Cast(arch.embedding, self._matrix(rows), self.io))
        return self.graph.op("Gather", [table, ids], name=EMBEDDING, axis=0)

    def _matrix(self, linear: Linear) -> Matrix:
        return Matrix(self.tensors, linear.parts, linear.k)

    def _ordered(self, name: str, linear: Linear, x: ir.Value, packing: Packing) -> ir.Value:
        """x with its columns in the order of the taken codes."""
        if not packing.order:
            return x
        if packing.order not in self._orders:
            order = ColumnOrder(cast("CodedSource", self.tensors), linear.parts[0].tensor, packing.order, linear.k)
            (self._orders[packing.order],) = self.graph.weight(order)
        gather = name.removesuffix("MatMul") + "Gather"
        return self.graph.op("Gather", [x, self._orders[packing.order]], name=gather, axis=-1)

    def _quantized(self, name: str, linear: Linear, q: Quantization) -> QuantizedMatrix | TakenMatrix:
        if q.taken is not None:
            source = cast("CodedSource", self.tensors)
            return TakenMatrix(_tensor_name(name), source, linear.parts, linear.k, q.taken, self.io)
        candidates = q.candidates if q.bits == 4 else 1  # at 8 bits a search gains next to nothing
        return QuantizedMatrix(
            _tensor_name(name), self._matrix(linear), q.bits, q.block_size, q.symmetric, candidates, self.io,
            q.half_quadratic,
        )  # fmt: skip

    def _head_weight(self) -> Weight:
        q = self.form.nodes.get(HEAD)
        if q is not None:
            return self._quantized(HEAD, self.arch.head(), q)
        return Cast(self.arch.embedding, self._matrix(self.arch.head()), self.io)

    def _shared_embedding(self) -> ir.Value:
        known = {value.name: value for value in self.graph.initializers}
        return known.get(self._shared[0].name) or self.graph.place(self._shared[0])

    def _embed_quantized(self, ids: ir.Value, rows: Linear, q: Quantization) -> ir.Value:
        """GatherBlockQuantized over the blocks that MatMulNBits reads, seen as [vocab, bytes of a row]."""
        graph, hidden = self.graph, self.arch.hidden
        places = self._shared or graph.data.add(self._quantized(EMBEDDING, rows, q))
        codes, *rest = places
        flat = Place(f"{codes.name}_rows", codes.dtype, (codes.shape[0], codes.shape[1] * codes.shape[2]), codes.offset)
        # The same bytes under another name: an initializer may only have one shape.
        others = [Place(f"{place.name}_rows", place.dtype, place.shape, place.offset) for place in rest]
        table, *parameters = (graph.place(place) for place in (flat, *others))
        out = graph.op(
            "GatherBlockQuantized",
            [table, ids, *parameters],
            name=EMBEDDING,
            domain=MICROSOFT,
            bits=q.bits,
            block_size=q.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        if hidden % q.block_size == 0:
            return out
        bounds = [graph.constant([0]), graph.constant([hidden]), graph.constant([-1])]
        return graph.op("Slice", [out, *bounds], name="/model/embed_tokens/Slice")


def _tensor_name(node: str, kind: str = "weight") -> str:
    """/model/layers.0/attn/o_proj/MatMul -> model.layers.0.attn.o_proj.MatMul.weight"""
    return f"{node.strip('/').replace('/', '.')}.{kind}"
