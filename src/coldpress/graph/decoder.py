"""A decoder as an ONNX graph for ONNX Runtime and onnxruntime-genai, its weights still on the other side of the disk.

    B batch, S new tokens, P past tokens, T = P + S, H heads, K key/value heads, D head size

    in   input_ids [B, S] int64 (or inputs_embeds [B, S, hidden]), attention_mask [B, T] int64,
         past_key_values.N.key, .value [B, K, P, D]
    out  logits [B, S, vocab], present.N.key, .value [B, K, T, D]  (hidden_states [B, S, hidden] on request)

    embed -> [norm -> qkv -> attention -> o] -> [norm -> gate, up -> silu(gate)*up -> down] -> ... -> norm -> head
             `---- the norm adds what the block before it yielded: SkipSimplifiedLayerNormalization

The attention kernel (com.microsoft.GroupQueryAttention) takes the number of valid tokens of a row from attention_mask,
so padding must stand on the right; rows padded on the left come out wrong in this form. It rotates queries and keys
itself where it can (`form.fused_rotary`); other head sizes get RotaryEmbedding nodes with positions computed from the
mask.
Operators: onnxruntime/docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from coldpress.artifacts.arch import Arch, Linear, Rows
from coldpress.artifacts.tensors import TensorSet
from coldpress.graph.form import EMBEDDING, HEAD, Form, fused_rotary, products
from coldpress.graph.ops import MICROSOFT, GraphWriter
from coldpress.graph.weights import Cast, DataFile, Matrix, Place, QuantizedMatrix, RopeTable, Transposed, Weight

__all__ = ["FLOATS", "build_decoder"]

FLOATS: Mapping[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


def build_decoder(
    arch: Arch,
    form: Form,
    tensors: TensorSet,
    data: DataFile,
    *,
    producer: tuple[str, str] = ("coldpress", ""),
    metadata: Mapping[str, str] | None = None,
) -> ir.Model:
    """The graph of `arch`; its weights are placed in `data`, of which nothing is written yet."""
    return _Decoder(arch, form, tensors, data).model(producer, metadata or {})


@dataclass(frozen=True)
class _Shared:
    """What every layer reads: lengths, positions and rotary tables."""

    last_index: ir.Value
    """Valid tokens of each row, less one: int32 [B]."""
    total: ir.Value
    """T, int32 scalar."""
    cos: ir.Value
    sin: ir.Value
    positions: ir.Value | None
    """int64 [B, S] where the kernel is told them."""


def _input(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


class _Decoder:
    def __init__(self, arch: Arch, form: Form, tensors: TensorSet, data: DataFile) -> None:
        self.arch, self.form, self.tensors = arch, form, tensors
        self.io = FLOATS[form.io]
        self.graph = GraphWriter(data)
        self.products = dict(products(arch))
        self.mask = _input("attention_mask", ir.DataType.INT64, ("batch_size", "total_sequence_length"))
        if form.exclude_embeds:
            self.ids = _input("inputs_embeds", self.io, ("batch_size", "sequence_length", arch.hidden))
        else:
            self.ids = _input("input_ids", ir.DataType.INT64, ("batch_size", "sequence_length"))
        past = ("batch_size", arch.kv_heads, "past_sequence_length", arch.head_dim)
        self.past = [
            tuple(_input(f"past_key_values.{layer}.{part}", self.io, past) for part in ("key", "value"))
            for layer in range(arch.layers)
        ]
        self.presents: list[ir.Value] = []
        self._head_places: tuple[Place, ...] = ()

    def model(self, producer: tuple[str, str], metadata: Mapping[str, str]) -> ir.Model:
        arch, form, graph = self.arch, self.form, self.graph
        if form.shares_embedding(arch):
            self._head_places = graph.data.add(self._head_weight())
        hidden = self.ids if form.exclude_embeds else self._embed()
        shared = self._shared()
        norm = graph.op(
            "SimplifiedLayerNormalization",
            [hidden, self._vector(arch.norm(0, arch.family.input_norm))],
            name="/model/layers.0/input_layernorm/LayerNorm",
            axis=-1,
            epsilon=arch.norm_eps,
            stash_type=1,
        )
        for layer in range(arch.layers):
            base = f"/model/layers.{layer}"
            attended = self._attention(layer, norm, shared)
            norm, hidden = self._add_norm(
                f"{base}/post_attention_layernorm", hidden, attended, arch.norm(layer, arch.family.post_norm)
            )
            out = self._mlp(layer, norm)
            if layer + 1 < arch.layers:
                weight = arch.norm(layer + 1, arch.family.input_norm)
                norm, hidden = self._add_norm(f"/model/layers.{layer + 1}/input_layernorm", hidden, out, weight)
            else:
                norm, hidden = self._add_norm("/model/final_norm", hidden, out, arch.final_norm, last=True)
        return graph.model(
            [self.ids, self.mask, *(value for pair in self.past for value in pair)],
            [*self._outputs(norm), *self.presents],
            producer=producer,
            metadata=metadata,
        )

    # Weights

    def _matrix(self, linear: Linear) -> Matrix:
        return Matrix(self.tensors, linear.parts, linear.k)

    def _vector(self, tensor: str, *more: str) -> ir.Value:
        """A norm weight or a bias, stacked from several tensors."""
        parts = tuple(Rows(name, 0, self.tensors.info(name).shape[0]) for name in (tensor, *more))
        return self.graph.weight(Cast(tensor, Matrix(self.tensors, parts, 1), self.io, vector=True))[0]

    def _quantized(self, name: str, linear: Linear, bits: int) -> QuantizedMatrix:
        q = self.form.quantization
        return QuantizedMatrix(
            name.strip("/").replace("/", ".") + ".weight",
            self._matrix(linear),
            bits,
            q.block_size,
            q.symmetric,
            q.candidates if bits == 4 else 1,  # at 8 bits a search gains next to nothing
            self.io,
        )

    def _head_weight(self) -> Weight:
        """The matrix that embedding and head share."""
        bits = self.form.bits.get(HEAD)
        if bits is not None:
            return self._quantized(HEAD, self.arch.head(), bits)
        return Cast(self.arch.embedding, self._matrix(self.arch.head()), self.io)

    def _product(self, name: str, x: ir.Value, output: str | None = None) -> ir.Value:
        """x W^T, and + b where the layer has a bias."""
        linear, bits = self.products[name], self.form.bits.get(name)
        outputs = None if output is None or linear.bias else (output,)
        if bits is not None:
            places = self._head_places if name == HEAD and self._head_places else None
            weight = self._quantized(name, linear, bits)
            values = self.graph.weight(weight) if places is None else tuple(map(self.graph.place, places))
            q = self.form.quantization
            y = self.graph.op(
                "MatMulNBits",
                [x, *values],
                name=name,
                domain=MICROSOFT,
                outputs=outputs,
                K=linear.k,
                N=linear.n,
                bits=bits,
                block_size=q.block_size,
                accuracy_level=q.accuracy_level,
            )
        elif name == HEAD and self._head_places:
            # One set of bytes for both: the product reads the embedding as it lies, [vocab, hidden].
            shared = self._shared_embedding()
            y = self.graph.op("FusedMatMul", [x, shared], name=name, domain=MICROSOFT, outputs=outputs, transB=1)
        else:
            tensor = name.strip("/").replace("/", ".") + ".weight"
            (w,) = self.graph.weight(Transposed(tensor, self._matrix(linear), self.io))
            y = self.graph.op("MatMul", [x, w], name=name, outputs=outputs)
        if not linear.bias:
            return y
        biases = [part.tensor.removesuffix("weight") + "bias" for part in linear.parts]
        return self.graph.op("Add", [y, self._vector(*biases)], name=name.removesuffix("MatMul") + "Add")

    def _shared_embedding(self) -> ir.Value:
        known = {value.name: value for value in self.graph.initializers}
        return known.get(self._head_places[0].name) or self.graph.place(self._head_places[0])

    # Embedding

    def _embed(self) -> ir.Value:
        arch, graph, bits = self.arch, self.graph, self.form.bits.get(EMBEDDING)
        rows = Linear((Rows(arch.embedding, 0, arch.vocab),), arch.vocab, arch.hidden, bias=False)
        if bits is not None:
            return self._embed_quantized(rows, bits)
        if self._head_places:
            table = self._shared_embedding()
        else:
            (table,) = graph.weight(Cast(arch.embedding, self._matrix(rows), self.io))
        return graph.op("Gather", [table, self.ids], name=EMBEDDING, axis=0)

    def _embed_quantized(self, rows: Linear, bits: int) -> ir.Value:
        """GatherBlockQuantized over the blocks that MatMulNBits reads, seen as [vocab, bytes of a row]."""
        arch, graph, q = self.arch, self.graph, self.form.quantization
        places = self._head_places or graph.data.add(self._quantized("/model/embed_tokens/Gather", rows, bits))
        codes, *rest = places
        flat = Place(f"{codes.name}_rows", codes.dtype, (codes.shape[0], codes.shape[1] * codes.shape[2]), codes.offset)
        # The same bytes under another name: an initializer may only have one shape.
        others = [Place(f"{place.name}_rows", place.dtype, place.shape, place.offset) for place in rest]
        table, *parameters = (graph.place(place) for place in (flat, *others))
        out = graph.op(
            "GatherBlockQuantized",
            [table, self.ids, *parameters],
            name=EMBEDDING,
            domain=MICROSOFT,
            bits=bits,
            block_size=q.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        if arch.hidden % q.block_size == 0:
            return out
        bounds = [graph.constant([0]), graph.constant([arch.hidden]), graph.constant([-1])]
        return graph.op("Slice", [out, *bounds], name="/model/embed_tokens/Slice")

    # Lengths, positions, rotary tables

    def _shared(self) -> _Shared:
        graph, base, int32 = self.graph, "/model/attn_mask_reformat", ir.DataType.INT32.value
        one, axis = graph.constant([1]), graph.constant(1)
        valid = graph.op("ReduceSum", [self.mask, one], name=f"{base}/ReduceSum", keepdims=0)
        last = graph.op("Sub", [valid, one], name=f"{base}/Sub")
        last_index = graph.op("Cast", [last], name=f"{base}/Sub/Cast", to=int32)
        shape = graph.op("Shape", [self.mask], name=f"{base}/Shape")
        length = graph.op("Gather", [shape, axis], name=f"{base}/Gather", axis=0)
        total = graph.op("Cast", [length], name=f"{base}/Gather/Cast", to=int32)
        switching = self.arch.rope.kind == "longrope" and self.arch.context_length > self.arch.rope.original_length
        by_position = switching and self.form.rope_switch == "position_ids"
        positions = None
        if by_position or not fused_rotary(self.arch):
            positions = self._positions(valid)
        if by_position:
            assert positions is not None
            original = graph.constant(self.arch.rope.original_length)
            beyond = graph.op("Greater", [length, original], name="/model/rope/Greater")
            flag = graph.op("Cast", [beyond], name="/model/rope/Cast", to=ir.DataType.INT64.value)
            offset = graph.op("Mul", [flag, original], name="/model/rope/Mul")
            positions = graph.op("Add", [positions, offset], name="/model/rope/Add")
        cos, sin = self._rope_tables(length, switching)
        return _Shared(last_index, total, cos, sin, positions)

    def _positions(self, valid: ir.Value) -> ir.Value:
        """Position of each new token, int64 [B, S]: a prompt counts from 0, later ones from what came before."""
        graph, base = self.graph, "/model/positions"
        shape = graph.op("Shape", [self.ids], name=f"{base}/Shape")
        new = graph.op("Gather", [shape, graph.constant(1)], name=f"{base}/Gather", axis=0)
        # A padded prompt row has fewer valid tokens than S: its past is 0, not negative.
        before = graph.op("Sub", [valid, new], name=f"{base}/Sub")
        past = graph.op("Max", [before, graph.constant(0)], name=f"{base}/Max")
        column = graph.op("Unsqueeze", [past, graph.constant([1])], name=f"{base}/Unsqueeze")
        steps = graph.op("Range", [graph.constant(0), new, graph.constant(1)], name=f"{base}/Range")
        return graph.op("Add", [column, steps], name=f"{base}/Add")

    def _rope_tables(self, length: ir.Value, switching: bool) -> tuple[ir.Value, ir.Value]:
        """cos and sin. A switching model has the short table in the first rows and the long one below, or an If."""
        rope, graph, context = self.arch.rope, self.graph, self.arch.context_length
        short, long = (rope.short_factors, rope.original_length), (rope.long_factors, context)
        if not switching:
            only = (rope.short_factors, context)
            cos, sin = graph.weight(RopeTable("cache", rope, (only,), self.io))
            return cos, sin
        if self.form.rope_switch == "position_ids":
            cos, sin = graph.weight(RopeTable("cache", rope, (short, long), self.io))
            return cos, sin
        branches = []
        for name, part in (("large", long), ("small", short)):
            tables = graph.weight(RopeTable(f"cache_{name}", rope, (part,), self.io))
            nodes = [
                ir.node(
                    "Identity", [table], outputs=[ir.Value(name=f"{table.name}_out")], name=f"/model/rope/{name}/{i}"
                )
                for i, table in enumerate(tables)
            ]
            for node, table in zip(nodes, tables, strict=True):
                node.outputs[0].type = table.type
            branches.append(ir.Graph([], [node.outputs[0] for node in nodes], nodes=nodes, name=f"{name}_rope"))
        beyond = graph.op("Greater", [length, graph.constant(rope.original_length)], name="/model/rope/Greater")
        cos, sin = graph.ops(
            "If",
            [beyond],
            name="/model/rope/If",
            outputs=("cos_cache", "sin_cache"),
            then_branch=branches[0],
            else_branch=branches[1],
        )
        return cos, sin

    # Blocks

    def _attention(self, layer: int, x: ir.Value, shared: _Shared) -> ir.Value:
        arch, graph, base = self.arch, self.graph, f"/model/layers.{layer}/attn"
        qkv = self._product(f"{base}/qkv_proj/MatMul", x)
        fused = fused_rotary(arch)
        if fused:
            query: tuple[ir.Value | None, ...] = (qkv, None, None)
            tables: tuple[ir.Value | None, ...] = (shared.cos, shared.sin)
            if shared.positions is not None:
                tables += (shared.positions,)
        else:
            sizes = [arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim, arch.kv_heads * arch.head_dim]
            q, k, v = graph.ops(
                "Split",
                [qkv, graph.constant(sizes)],
                name=f"{base}/Split",
                outputs=[f"{base}/Split/output_{i}" for i in range(3)],
                axis=-1,
            )
            query = (self._rotate(f"{base}/q_rotary", q, arch.heads, shared),
                     self._rotate(f"{base}/k_rotary", k, arch.kv_heads, shared), v)  # fmt: skip
            tables = ()
        out, key, value = graph.ops(
            "GroupQueryAttention",
            [*query, *self.past[layer], shared.last_index, shared.total, *tables],
            name=f"{base}/GroupQueryAttention",
            domain=MICROSOFT,
            outputs=(f"{base}/GroupQueryAttention/output_0", f"present.{layer}.key", f"present.{layer}.value"),
            num_heads=arch.heads,
            kv_num_heads=arch.kv_heads,
            scale=arch.head_dim**-0.5,
            local_window_size=-1 if arch.sliding_window is None else arch.sliding_window,
            do_rotary=int(fused),
            rotary_interleaved=0,
        )
        for present in (key, value):
            present.type = ir.TensorType(self.io)
            present.shape = ir.Shape(("batch_size", arch.kv_heads, "total_sequence_length", arch.head_dim))
            self.presents.append(present)
        return self._product(f"{base}/o_proj/MatMul", out)

    def _rotate(self, name: str, x: ir.Value, heads: int, shared: _Shared) -> ir.Value:
        partial = self.arch.rope.dim if self.arch.rope.dim != self.arch.head_dim else 0
        return self.graph.op(
            "RotaryEmbedding",
            [x, shared.positions, shared.cos, shared.sin],
            name=f"{name}/RotaryEmbedding",
            domain=MICROSOFT,
            interleaved=0,
            num_heads=heads,
            rotary_embedding_dim=partial,
        )

    def _mlp(self, layer: int, x: ir.Value) -> ir.Value:
        base = f"/model/layers.{layer}/mlp"
        gate = self._product(f"{base}/gate_proj/MatMul", x)
        up = self._product(f"{base}/up_proj/MatMul", x)
        sigmoid = self.graph.op("Sigmoid", [gate], name=f"{base}/act_fn/Sigmoid")
        silu = self.graph.op("Mul", [gate, sigmoid], name=f"{base}/act_fn/Mul")
        product = self.graph.op("Mul", [silu, up], name=f"{base}/Mul")
        return self._product(f"{base}/down_proj/MatMul", product)

    def _add_norm(
        self, base: str, residual: ir.Value, x: ir.Value, weight: str, *, last: bool = False
    ) -> tuple[ir.Value, ir.Value]:
        """norm(residual + x), and the sum itself."""
        wants_output = last and (self.form.exclude_lm_head or self.form.include_hidden_states)
        normed = "hidden_states" if wants_output else f"{base}/output_0"
        values = self.graph.ops(
            "SkipSimplifiedLayerNormalization",
            [residual, x, self._vector(weight)],
            name=f"{base}/SkipLayerNorm",
            domain=MICROSOFT,
            outputs=(normed,) if last else (normed, "", "", f"{base}/output_3"),
            epsilon=self.arch.norm_eps,
        )
        return values[0], values[-1]

    def _outputs(self, norm: ir.Value) -> list[ir.Value]:
        found = []
        if not self.form.exclude_lm_head:
            logits = self._product(HEAD, norm, output="logits")
            logits.shape = ir.Shape(("batch_size", "sequence_length", self.arch.vocab))
            found.append(logits)
        if self.form.exclude_lm_head or self.form.include_hidden_states:
            norm.shape = ir.Shape(("batch_size", "sequence_length", self.arch.hidden))
            found.append(norm)
        for value in found:
            value.type = ir.TensorType(self.io)
        return found
