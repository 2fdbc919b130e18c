"""A decoder as an ONNX graph for ONNX Runtime and onnxruntime-genai, its weights still on the other side of the disk.

    B batch, S new tokens, P past tokens, T = P + S, H heads, K key/value heads, D head size

    in   input_ids [B, S] int64 (or inputs_embeds [B, S, hidden]), attention_mask [B, T] int64,
         past_key_values.N.key, .value [B, K, P, D]; position_ids [B, S] where `form.takes_position_ids`;
         A and B of LoRA adapters on request (`graph.lora`)
    out  logits [B, S, vocab], present.N.key, .value [B, K, T, D]  (hidden_states [B, S, hidden] on request)

    embed -> [norm -> qkv -> attention -> o] -> [norm -> gate, up -> act(gate)*up -> down] -> ... -> norm -> head
             `---- the norm adds what the block before it yielded: Skip(Simplified)LayerNormalization

The attention kernel (com.microsoft.GroupQueryAttention) takes the number of valid tokens of a row from attention_mask,
so padding must stand on the right; `form.left_padding` is another graph. It rotates queries and keys itself where it
can (`form.fused_rotary`); other head sizes get RotaryEmbedding nodes with positions computed from the mask.
Operators: onnxruntime/docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from coldpress.artifacts.arch import Arch, Rope, Rows
from coldpress.artifacts.tensors import TensorSource
from coldpress.graph.experts import ExpertWriter
from coldpress.graph.form import HEAD, Form, fused_rotary, packs_qkv
from coldpress.graph.linear import LinearWriter
from coldpress.graph.ops import FLOATS, MICROSOFT, GraphWriter
from coldpress.graph.positions import Positions, write_positions
from coldpress.graph.weights import DataFile

__all__ = ["build_decoder"]


def build_decoder(
    arch: Arch,
    form: Form,
    tensors: TensorSource,
    data: DataFile,
    *,
    producer: tuple[str, str] = ("coldpress", ""),
    metadata: Mapping[str, str] | None = None,
) -> ir.Model:
    """The graph of `arch`; its weights are placed in `data`, of which nothing is written yet."""
    return _Decoder(arch, form, tensors, data).model(producer, metadata or {})


@dataclass(frozen=True)
class _Stream:
    """The residual stream: what it was, and what the last block adds to it."""

    sum: ir.Value
    pending: ir.Value | None = None


def _input(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


class _Decoder:
    def __init__(self, arch: Arch, form: Form, tensors: TensorSource, data: DataFile) -> None:
        self.arch, self.form = arch, form
        self.io = FLOATS[form.io]
        self.graph = GraphWriter(data)
        self.linear = LinearWriter(arch, form, tensors, self.graph)
        self.experts = ExpertWriter(arch, form, tensors, self.linear)
        self.mask = _input("attention_mask", ir.DataType.INT64, ("batch_size", "total_sequence_length"))
        if form.exclude_embeds:
            self.ids = _input("inputs_embeds", self.io, ("batch_size", "sequence_length", arch.hidden))
        else:
            self.ids = _input("input_ids", ir.DataType.INT64, ("batch_size", "sequence_length"))
        self.position_ids: ir.Value | None = None
        if form.takes_position_ids:
            self.position_ids = _input("position_ids", ir.DataType.INT64, ("batch_size", "sequence_length"))
        past = ("batch_size", arch.kv_heads, "past_sequence_length", arch.head_dim)
        self.past = [
            tuple(_input(f"past_key_values.{layer}.{part}", self.io, past) for part in ("key", "value"))
            for layer in range(arch.layers)
        ]
        self.presents: list[ir.Value] = []

    def model(self, producer: tuple[str, str], metadata: Mapping[str, str]) -> ir.Model:
        arch, form = self.arch, self.form
        hidden = self.ids if form.exclude_embeds else self.linear.embed(self.ids)
        if not (form.exclude_embeds and arch.scales.in_embedding):
            hidden = self._times(hidden, arch.scales.embedding, "/model/embed_tokens/Mul")
        positions = write_positions(arch, form, self.graph, self.mask, self.ids, self.position_ids)
        stream = _Stream(hidden)
        for layer in range(arch.layers):
            stream = self._block(layer, stream, positions)
        norm, _ = self._norm("/model/final_norm", stream, arch.final_norm, keep_sum=False)
        inputs = [self.ids, self.mask, *([] if self.position_ids is None else [self.position_ids])]
        outputs = self._outputs(norm, positions)
        return self.graph.model(
            [*inputs, *(value for pair in self.past for value in pair), *self.linear.lora.values],
            [*outputs, *self.presents],
            producer=producer,
            metadata=metadata,
        )

    # Blocks

    def _block(self, layer: int, stream: _Stream, positions: Positions) -> _Stream:
        arch, names = self.arch, self.arch.family.names
        base = f"/model/layers.{layer}"

        def norm(name: str | None, stream: _Stream) -> tuple[ir.Value, _Stream]:
            if name is None:
                settled = self._settled(f"{base}/Add", stream)
                return settled.sum, settled
            return self._norm(f"{base}/{name}", stream, arch.of_layer(layer, name))

        def leaving(x: ir.Value, name: str | None, part: str) -> ir.Value:
            if name is not None:
                x, _ = self._norm(f"{base}/{name}", _Stream(x), arch.of_layer(layer, name))
            return self._times(x, arch.scales.residual, f"{base}/{part}/residual/Mul")

        before, stream = norm(names.attention_norm, stream)
        attended = leaving(self._attention(layer, before, positions), names.attention_out_norm, "attn")
        if arch.parallel:
            if names.mlp_norm is not None:
                before, stream = norm(names.mlp_norm, stream)
            out = leaving(self._mlp(layer, before), names.mlp_out_norm, "mlp")
            return _Stream(stream.sum, self.graph.op("Add", [attended, out], name=f"{base}/parallel/Add"))
        before, stream = norm(names.mlp_norm, _Stream(stream.sum, attended))
        return _Stream(stream.sum, leaving(self._mlp(layer, before), names.mlp_out_norm, "mlp"))

    def _attention(self, layer: int, x: ir.Value, positions: Positions) -> ir.Value:
        arch, graph, base = self.arch, self.graph, f"/model/layers.{layer}/attn"
        rope, window = arch.ropes[layer], arch.windows[layer]
        # The kernel's own rotary counts positions from the left end of a row, padding included.
        in_kernel = self.form.rotary == "attention" and not self.form.left_padding
        fused = rope is not None and fused_rotary(arch, rope) and in_kernel
        query: list[ir.Value | None]
        if packs_qkv(arch, self.form) and (rope is None or fused):
            query = [self.linear.product(f"{base}/qkv_proj/MatMul", x), None, None]
        else:
            query = list(self._apart(layer, x, rope if not fused else None, positions))
        if rope is not None and fused:
            rotary: list[ir.Value | None] = [*positions.table(rope), positions.positions]
        else:
            rotary = [None, None, None]
        out, key, value = graph.ops(
            "GroupQueryAttention",
            _trimmed(
                [
                    *query,
                    *self.past[layer],
                    positions.last_index,
                    positions.total,
                    *rotary,
                    positions.bias,
                    self._sinks(layer),
                ]
            ),
            name=f"{base}/GroupQueryAttention",
            domain=MICROSOFT,
            outputs=(f"{base}/GroupQueryAttention/output_0", f"present.{layer}.key", f"present.{layer}.value"),
            num_heads=arch.heads,
            kv_num_heads=arch.kv_heads,
            scale=arch.head_dim**-0.5 if arch.scales.attention is None else arch.scales.attention,
            local_window_size=-1 if window is None else window,
            softcap=arch.scales.attention_cap or 0.0,
            do_rotary=int(fused),
            rotary_interleaved=0,
        )
        for present in (key, value):
            present.type = ir.TensorType(self.io)
            present.shape = ir.Shape(("batch_size", arch.kv_heads, "total_sequence_length", arch.head_dim))
            self.presents.append(present)
        return self.linear.product(f"{base}/o_proj/MatMul", out)

    def _sinks(self, layer: int) -> ir.Value | None:
        if self.arch.family.names.sinks is None:
            return None
        name = self.arch.sinks(layer)
        return self.linear.vector(name, [Rows(name, 0, self.arch.heads)])

    def _apart(
        self, layer: int, x: ir.Value, rope: Rope | None, positions: Positions
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Query, key and value, normed where the family does that, and rotated by `rope`."""
        arch, graph, base = self.arch, self.graph, f"/model/layers.{layer}/attn"
        if packs_qkv(arch, self.form):
            sizes = [arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim, arch.kv_heads * arch.head_dim]
            q, k, v = graph.ops(
                "Split",
                [self.linear.product(f"{base}/qkv_proj/MatMul", x), graph.constant(sizes)],
                name=f"{base}/Split",
                outputs=[f"{base}/Split/output_{i}" for i in range(3)],
                axis=-1,
            )
        else:
            q, k, v = (self.linear.product(f"{base}/{part}_proj/MatMul", x) for part in "qkv")
        names = arch.family.names
        if names.q_norm is not None and names.k_norm is not None:
            q = self._norm_heads(layer, f"{base}/q_norm", q, names.q_norm, arch.heads)
            k = self._norm_heads(layer, f"{base}/k_norm", k, names.k_norm, arch.kv_heads)
        if rope is not None:
            q = self._rotate(f"{base}/q_rotary", q, arch.heads, rope, positions)
            k = self._rotate(f"{base}/k_rotary", k, arch.kv_heads, rope, positions)
        return q, k, v

    def _norm_heads(self, layer: int, base: str, x: ir.Value, name: str, heads: int) -> ir.Value:
        weight, size = self.arch.of_layer(layer, name), self.arch.head_dim
        if self.arch.family.qk_norm == "all":
            return self._norm(base, _Stream(x), weight, length=heads * size)[0]
        apart = self.graph.op("Reshape", [x, self.graph.constant([0, 0, heads, size])], name=f"{base}/Reshape_1")
        normed, _ = self._norm(base, _Stream(apart), weight, length=size)
        flat = self.graph.constant([0, 0, heads * size])
        return self.graph.op("Reshape", [normed, flat], name=f"{base}/Reshape_2")

    def _rotate(self, name: str, x: ir.Value, heads: int, rope: Rope, positions: Positions) -> ir.Value:
        partial = rope.dim if rope.dim != self.arch.head_dim else 0
        return self.graph.op(
            "RotaryEmbedding",
            [x, positions.positions, *positions.table(rope)],
            name=f"{name}/RotaryEmbedding",
            domain=MICROSOFT,
            interleaved=0,
            num_heads=heads,
            rotary_embedding_dim=partial,
        )

    def _mlp(self, layer: int, x: ir.Value) -> ir.Value:
        if self.arch.has_experts(layer):
            return self.experts.write(layer, x)
        base, graph, product = f"/model/layers.{layer}/mlp", self.graph, self.linear.product
        if not self.arch.family.gated:
            inner = self._activated(f"{base}/act_fn", product(f"{base}/up_proj/MatMul", x))
        else:
            if self.form.fused_gate_up:
                both = product(f"{base}/gate_up_proj/MatMul", x)
                sizes = graph.constant([self.arch.intermediate] * 2)
                outputs = [f"{base}/gate_up_proj/Split/output_{i}" for i in range(2)]
                gate, up = graph.ops(
                    "Split", [both, sizes], name=f"{base}/gate_up_proj/Split", outputs=outputs, axis=-1
                )
            else:
                gate, up = (product(f"{base}/{half}_proj/MatMul", x) for half in ("gate", "up"))
            inner = graph.op("Mul", [self._activated(f"{base}/act_fn", gate), up], name=f"{base}/Mul")
        return product(f"{base}/down_proj/MatMul", inner)

    def _activated(self, base: str, x: ir.Value) -> ir.Value:
        if self.arch.activation == "silu":  # ONNX Runtime makes one node of the two when it loads the graph
            sigmoid = self.graph.op("Sigmoid", [x], name=f"{base}/Sigmoid")
            return self.graph.op("Mul", [x, sigmoid], name=f"{base}/Mul")
        kind = {"gelu": "Gelu", "gelu_tanh": "FastGelu"}[self.arch.activation]
        return self.graph.op(kind, [x], name=f"{base}/{kind}", domain=MICROSOFT)

    # Norms and the residual stream

    def _norm(
        self, base: str, stream: _Stream, weight: str, *, keep_sum: bool = True, length: int | None = None
    ) -> tuple[ir.Value, _Stream]:
        """norm(sum + pending), and the stream with the two added."""
        rms = self.arch.family.norm == "rms"
        rows = Rows(weight, 0, length or self.arch.hidden)
        parameters = [self.linear.vector(weight, [rows], add=1.0 if self.arch.family.norm_offset else 0.0)]
        if not rms:
            bias = weight.removesuffix("weight") + "bias"
            parameters.append(self.linear.vector(bias, [Rows(bias, 0, rows.count)]))
        if stream.pending is None:
            normed = self.graph.op(
                "SimplifiedLayerNormalization" if rms else "LayerNormalization",
                [stream.sum, *parameters],
                name=f"{base}/LayerNorm",
                axis=-1,
                epsilon=self.arch.norm_eps,
                stash_type=1,
            )
            return normed, stream
        normed, *more = self.graph.ops(
            "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization",
            [stream.sum, stream.pending, *parameters],
            name=f"{base}/SkipLayerNorm",
            domain=MICROSOFT,
            outputs=(f"{base}/output_0", "", "", f"{base}/output_3") if keep_sum else (f"{base}/output_0",),
            epsilon=self.arch.norm_eps,
        )
        return normed, _Stream(more[-1] if keep_sum else stream.sum)

    def _settled(self, name: str, stream: _Stream) -> _Stream:
        if stream.pending is None:
            return stream
        return _Stream(self.graph.op("Add", [stream.sum, stream.pending], name=f"{name}/{stream.pending.name}"))

    def _times(self, x: ir.Value, factor: float, name: str) -> ir.Value:
        if factor == 1.0:
            return x
        return self.graph.op("Mul", [x, self._number(factor)], name=name)

    def _number(self, value: float) -> ir.Value:
        return self.graph.constant(value, self.io.numpy().type)

    # Outputs

    def _outputs(self, norm: ir.Value, positions: Positions) -> list[ir.Value]:
        found: list[tuple[str, ir.Value, int, str]] = []
        if not self.form.exclude_lm_head:
            last = self._last_token(norm, positions) if self.form.prune_head else norm
            length = "last_token" if self.form.prune_head else "sequence_length"
            found.append(("logits", self._logits(last), self.arch.vocab, length))
        if self.form.exclude_lm_head or self.form.include_hidden_states:
            found.append(("hidden_states", norm, self.arch.hidden, "sequence_length"))
        for name, value, width, length in found:
            value.name, value.type = name, ir.TensorType(self.io)
            value.shape = ir.Shape(("batch_size", 1 if length == "last_token" else length, width))
        return [value for _, value, _, _ in found]

    def _logits(self, norm: ir.Value) -> ir.Value:
        scales = self.arch.scales
        logits = self._times(self.linear.product(HEAD, norm), scales.logits, "/lm_head/Mul")
        if scales.logits_cap is None:
            return logits
        cap = self._number(scales.logits_cap)
        divided = self.graph.op("Div", [logits, cap], name="/lm_head/softcap/Div")
        bent = self.graph.op("Tanh", [divided], name="/lm_head/softcap/Tanh")
        return self.graph.op("Mul", [bent, cap], name="/lm_head/softcap/Mul")

    def _last_token(self, x: ir.Value, positions: Positions) -> ir.Value:
        """[B, 1, hidden] of each row's last valid token."""
        graph, base = self.graph, "/model/last_token"
        shape = graph.op("Shape", [x], name=f"{base}/Shape")
        new = graph.op("Gather", [shape, graph.constant(1)], name=f"{base}/Gather", axis=0)
        past = graph.op("Sub", [positions.length, new], name=f"{base}/Past")
        last = graph.op("Cast", [positions.last_index], name=f"{base}/Cast", to=ir.DataType.INT64.value)
        # A row that was padded in the prompt has fewer valid tokens than the cache has places: its new token is at 0.
        place = graph.op("Max", [graph.op("Sub", [last, past], name=f"{base}/Sub"), graph.constant(0)],
                         name=f"{base}/Max")  # fmt: skip
        index = graph.op("Unsqueeze", [place, graph.constant([1, 2])], name=f"{base}/Unsqueeze")
        return graph.op("GatherND", [x, index], name=f"{base}/GatherND", batch_dims=1)


def _trimmed(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    """Without the absent ones at the end: a node has no more inputs than it needs."""
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs
