"""Which graph to build of a decoder, and how many bytes it takes: arithmetic only, so that a plan can use it.

Node names are those of onnxruntime-genai's builder, because users write them into `nodes_to_exclude`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from coldpress.artifacts.arch import Arch, Linear, Rope
from coldpress.artifacts.stored import Packing

__all__ = [
    "EMBEDDING",
    "HEAD",
    "WRITE_BUDGET",
    "FloatType",
    "Form",
    "Quantization",
    "data_bytes",
    "expert_nodes",
    "fused_rotary",
    "mixed_layers",
    "packs_qkv",
    "products",
    "prompt_bytes",
    "routers",
]

FloatType = Literal["float32", "float16", "bfloat16"]

EMBEDDING = "/model/embed_tokens/Gather"
HEAD = "/lm_head/MatMul"
WRITE_BUDGET = 96 << 20
"""Bytes of weights in memory at once while a graph is written, all threads together."""
_WIDTH: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Quantization:
    """How a matrix is quantized."""

    bits: int = 4
    block_size: int = 32
    symmetric: bool = True
    accuracy_level: int = 4
    """What MatMulNBits computes in: 1 float32, 2 float16, 3 bfloat16, 4 int8; 0 lets the kernel choose."""
    candidates: int = 1
    """Scales tried for a block; see `kernels.quantize`."""
    half_quadratic: bool = False
    """Zero points are floats, fitted by `kernels.hqq`; `symmetric` is then False."""
    taken: Packing | None = None
    """The checkpoint's own codes are taken over: they have these bits and blocks."""


@dataclass(frozen=True)
class Form:
    """A graph, in all that is not given by the decoder itself."""

    io: FloatType
    """Activations, KV cache and logits."""
    nodes: Mapping[str, Quantization] = field(default_factory=dict)
    """Of each quantized node, by its name (`products`, EMBEDDING); a node that is absent stays in `io`."""
    packed_qkv: bool = True
    """Query, key and value in one product."""
    fused_gate_up: bool = False
    """Gate and up in one product."""
    prune_head: bool = False
    """Logits of each row's last valid token only: [B, 1, vocab]."""
    left_padding: bool = False
    """Rows may be padded on the left: positions are an input, and the mask goes into the scores. Not for GenAI."""
    exclude_embeds: bool = False
    """Input is `inputs_embeds` instead of `input_ids`."""
    exclude_lm_head: bool = False
    """Output is `hidden_states` instead of `logits`."""
    include_hidden_states: bool = False
    """Output is `hidden_states` besides `logits`."""
    int8_tokens: bool = False
    """Quantized products, the head apart, in int8: one scale for each row of W, one for each token's activations. For
    prompts; see `graph.int8_tokens`."""
    lora_modules: frozenset[str] = frozenset()
    """Last parts of the names of the linear layers that LoRA adapters may change at run time; see `graph.lora`."""
    qdq: bool = False
    """Products read their blocks through DequantizeLinear instead of MatMulNBits; see `graph.qdq`."""
    rotary: Literal["attention", "node"] = "attention"
    """Who rotates queries and keys: the attention kernel where it can, or nodes before it, which read position_ids."""
    transposed_products: bool = True
    """Whether a product can read a matrix of floats as it lies, so that a tied head needs no copy (FusedMatMul)."""
    rope_switch: Literal["position_ids", "if"] = "position_ids"
    """How a longrope model gets from its short to its long table: by the positions given to the attention kernel, or by
    an If node, which copies a table on each run, for kernels that take no positions."""

    @property
    def takes_position_ids(self) -> bool:
        """Whether positions are an input of the graph."""
        return self.left_padding or self.rotary == "node"

    def shares_embedding(self, arch: Arch) -> bool:
        """Whether embedding and head are one set of bytes."""
        lies_transposed = self.qdq if HEAD in self.nodes else not self.transposed_products
        both = not self.exclude_embeds and not self.exclude_lm_head and not lies_transposed
        return arch.tied and both and _layout(self.nodes.get(EMBEDDING)) == _layout(self.nodes.get(HEAD))


def _layout(quantization: Quantization | None) -> Quantization | None:
    """What decides over the bytes: not what the product computes in."""
    return None if quantization is None else replace(quantization, accuracy_level=0)


def products(arch: Arch, form: Form | None = None) -> Iterator[tuple[str, Linear]]:
    """Name and matrix of every matrix product of the full graph, in order; `form` says which are fused."""
    form = form or Form("float32")
    for layer in range(arch.layers):
        base = f"/model/layers.{layer}"
        if packs_qkv(arch, form):
            yield f"{base}/attn/qkv_proj/MatMul", arch.qkv(layer)
        else:
            yield f"{base}/attn/q_proj/MatMul", arch.q(layer)
            yield f"{base}/attn/k_proj/MatMul", arch.k(layer)
            yield f"{base}/attn/v_proj/MatMul", arch.v(layer)
        yield f"{base}/attn/o_proj/MatMul", arch.o(layer)
        if arch.has_experts(layer):
            continue
        if arch.family.gated and form.fused_gate_up:
            yield f"{base}/mlp/gate_up_proj/MatMul", arch.gate_up(layer)
        else:
            if arch.family.gated:
                yield f"{base}/mlp/gate_proj/MatMul", arch.gate(layer)
            yield f"{base}/mlp/up_proj/MatMul", arch.up(layer)
        yield f"{base}/mlp/down_proj/MatMul", arch.down(layer)
    yield HEAD, arch.head()


def routers(arch: Arch) -> Iterator[tuple[str, Linear]]:
    """Name and matrix of the products that choose experts. They stay in floating point: they are small, and a rounded
    one sends tokens to other experts."""
    for layer in range(arch.layers):
        if arch.has_experts(layer):
            yield f"/model/layers.{layer}/moe/router/MatMul", arch.router(layer)


def expert_nodes(arch: Arch) -> dict[str, int]:
    """Layer of each node that holds a layer's experts, by the node's name where they are quantized."""
    return {f"/model/layers.{layer}/moe/QMoE": layer for layer in range(arch.layers) if arch.has_experts(layer)}


def packs_qkv(arch: Arch, form: Form) -> bool:
    """Queries and keys that are normed come from products of their own: cutting one apart again costs a copy."""
    return form.packed_qkv and arch.family.qk_norm is None


def mixed_layers(arch: Arch) -> frozenset[str]:
    """The products that llama.cpp's mixed types keep in more bits: query, key, value and down of the first and last
    eighth of the layers, and of every third between."""
    eighth = arch.layers // 8
    chosen = [
        layer
        for layer in range(arch.layers)
        if layer < eighth or layer >= arch.layers - eighth or (layer - eighth) % 3 == 2
    ]
    return frozenset(
        f"/model/layers.{layer}/{part}_proj/MatMul"
        for layer in chosen
        for part in ("attn/qkv", "attn/q", "attn/k", "attn/v", "mlp/down")
    )


def fused_rotary(arch: Arch, rope: Rope) -> bool:
    """Whether the attention kernel can rotate by itself: ONNX Runtime 1.32 wants multiples of 16 for both sizes."""
    return arch.head_dim % 16 == 0 and rope.dim % 16 == 0


def _matrix_bytes(form: Form, q: Quantization | None, n: int, k: int) -> int:
    if q is None:
        return n * k * _WIDTH[form.io]
    blocks = -(-k // q.block_size)
    zeros = blocks * _WIDTH[form.io] if q.half_quadratic else 0 if q.symmetric else -(-blocks * q.bits // 8)
    return n * (blocks * (q.block_size * q.bits // 8 + _WIDTH[form.io]) + zeros)


def _expert_bytes(arch: Arch, form: Form, q: Quantization | None) -> int:
    """Of the experts of one layer: rows are not filled up to whole blocks, as those of a product are."""
    (names, mixture), total, width = arch.experts, 0, _WIDTH[form.io]
    for n, k in ((2 * mixture.inner, arch.hidden), (arch.hidden, mixture.inner)):
        row = k * width
        if q is not None:
            blocks = -(-k // q.block_size)
            row = k * q.bits // 8 + blocks * width + (0 if q.symmetric else -(-blocks * q.bits // 8))
        total += n * (row + names.bias * width)
    return total * mixture.experts


def prompt_bytes(arch: Arch, form: Form) -> int:
    """Bytes that the weights of an int8 graph for prompts add to those of `form`."""
    added = [linear for name, linear in products(arch, form) if name != HEAD and name in form.nodes]
    return sum(linear.n * (linear.k + _WIDTH[form.io]) for linear in added)


def data_bytes(arch: Arch, form: Form) -> int:
    """Bytes of the external data file, but for the padding between tensors."""
    width = _WIDTH[form.io]
    norms = arch.hidden + sum(length for layer in range(arch.layers) for _, length in arch.norms(layer))
    total = norms * width * (2 if arch.family.norm == "layer" else 1)
    for name, linear in products(arch, form):
        if name == HEAD and form.exclude_lm_head:
            continue
        total += _matrix_bytes(form, form.nodes.get(name), linear.n, linear.k) + bool(linear.bias) * linear.n * width
    for _, linear in routers(arch):
        total += (linear.n * linear.k + bool(linear.bias) * linear.n) * width
    total += sum(_expert_bytes(arch, form, form.nodes.get(name)) for name in expert_nodes(arch))
    total += arch.layers * arch.heads * width if arch.family.names.sinks is not None else 0
    if not form.exclude_embeds and not form.shares_embedding(arch):
        total += _matrix_bytes(form, form.nodes.get(EMBEDDING), arch.vocab, arch.hidden)
    for rope in arch.rope_kinds:
        positions = arch.context_length
        if rope.kind == "longrope":
            positions += min(rope.original_length, arch.context_length)
        total += positions * rope.dim * width
    return total
