"""Which graph to build of a decoder, and how many bytes it takes: arithmetic only, so that a plan can use it.

Node names are those of onnxruntime-genai's builder, because users write them into `nodes_to_exclude`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from coldpress.artifacts.arch import Arch, Linear

__all__ = [
    "EMBEDDING",
    "HEAD",
    "WRITE_BUDGET",
    "FloatType",
    "Form",
    "Quantization",
    "data_bytes",
    "fused_rotary",
    "mixed_layers",
    "products",
]

FloatType = Literal["float32", "float16", "bfloat16"]

EMBEDDING = "/model/embed_tokens/Gather"
HEAD = "/lm_head/MatMul"
WRITE_BUDGET = 96 << 20
"""Bytes of weights in memory at once while a graph is written, all threads together."""
_WIDTH: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Quantization:
    """How the quantized matrices of a graph are quantized."""

    block_size: int = 32
    symmetric: bool = True
    accuracy_level: int = 4
    """What MatMulNBits computes in: 1 float32, 2 float16, 3 bfloat16, 4 int8; 0 lets the kernel choose."""
    candidates: int = 1
    """Scales tried for a block; see `kernels.quantize`."""


@dataclass(frozen=True)
class Form:
    """A graph, in all that is not given by the decoder itself."""

    io: FloatType
    """Activations, KV cache and logits."""
    bits: Mapping[str, int] = field(default_factory=dict)
    """4 or 8 for each quantized node, by its name (`products`, EMBEDDING); a node that is absent stays in `io`."""
    quantization: Quantization = Quantization()
    exclude_embeds: bool = False
    """Input is `inputs_embeds` instead of `input_ids`."""
    exclude_lm_head: bool = False
    """Output is `hidden_states` instead of `logits`."""
    include_hidden_states: bool = False
    """Output is `hidden_states` besides `logits`."""
    rope_switch: Literal["position_ids", "if"] = "position_ids"
    """How a longrope model gets from its short to its long table: by the positions given to the attention kernel, or by
    an If node, which copies a table on each run, for kernels that take no positions."""

    def shares_embedding(self, arch: Arch) -> bool:
        """Whether embedding and head are one set of bytes."""
        both = not self.exclude_embeds and not self.exclude_lm_head
        return arch.tied and both and self.bits.get(EMBEDDING) == self.bits.get(HEAD)


def products(arch: Arch) -> Iterator[tuple[str, Linear]]:
    """Name and matrix of every matrix product of the full graph, in order."""
    for layer in range(arch.layers):
        base = f"/model/layers.{layer}"
        yield f"{base}/attn/qkv_proj/MatMul", arch.qkv(layer)
        yield f"{base}/attn/o_proj/MatMul", arch.o(layer)
        yield f"{base}/mlp/gate_proj/MatMul", arch.gate(layer)
        yield f"{base}/mlp/up_proj/MatMul", arch.up(layer)
        yield f"{base}/mlp/down_proj/MatMul", arch.down(layer)
    yield HEAD, arch.head()


def mixed_layers(arch: Arch) -> frozenset[str]:
    """The products that llama.cpp's mixed types keep in more bits: qkv and down of the first and last eighth of the
    layers, and of every third between."""
    eighth = arch.layers // 8
    chosen = [
        layer
        for layer in range(arch.layers)
        if layer < eighth or layer >= arch.layers - eighth or (layer - eighth) % 3 == 2
    ]
    return frozenset(
        f"/model/layers.{layer}/{part}/MatMul" for layer in chosen for part in ("attn/qkv_proj", "mlp/down_proj")
    )


def fused_rotary(arch: Arch) -> bool:
    """Whether the attention kernel can rotate by itself: ONNX Runtime 1.32 wants multiples of 16 for both sizes."""
    return arch.head_dim % 16 == 0 and arch.rope.dim % 16 == 0


def _matrix_bytes(form: Form, bits: int | None, n: int, k: int) -> int:
    if bits is None:
        return n * k * _WIDTH[form.io]
    blocks = -(-k // form.quantization.block_size)
    zeros = 0 if form.quantization.symmetric else -(-blocks * bits // 8)
    return n * (blocks * (form.quantization.block_size * bits // 8 + _WIDTH[form.io]) + zeros)


def data_bytes(arch: Arch, form: Form) -> int:
    """Bytes of the external data file, but for the padding between tensors."""
    width = _WIDTH[form.io]
    total = (2 * arch.layers + 1) * arch.hidden * width
    for name, linear in products(arch):
        if name == HEAD and form.exclude_lm_head:
            continue
        total += _matrix_bytes(form, form.bits.get(name), linear.n, linear.k) + linear.bias * linear.n * width
    if not form.exclude_embeds and not form.shares_embedding(arch):
        total += _matrix_bytes(form, form.bits.get(EMBEDDING), arch.vocab, arch.hidden)
    positions = arch.context_length
    if arch.rope.kind == "longrope":
        positions += min(arch.rope.original_length, arch.context_length)
    return total + positions * arch.rope.dim * width
