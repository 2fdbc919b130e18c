"""Experts in ModelBuilder: how those of each layer are quantized, and what speaks against it on a provider.

Sources: what ONNX Runtime 1.32 does on the CPU stands in `graph.experts`, with the tests that saw it. CUDA:
moe_quantization.cc takes blocks of 32, 64 or 128 that divide the columns. WebGPU: contrib_ops/webgpu/moe/moe.cc is not
implemented, qmoe.cc refuses zero points and reads no routing weights. DirectML has neither kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from coldpress.artifacts.arch import Arch
from coldpress.graph.form import Form, Quantization, expert_nodes

__all__ = ["against_experts", "expert_columns", "expert_notes", "experts_quantized"]


def expert_columns(arch: Arch) -> tuple[int, ...]:
    """Columns of the experts' two projections."""
    return () if arch.mixture is None else (arch.hidden, arch.mixture.inner)


def experts_quantized(arch: Arch, base: Quantization, *, in_8_bits: bool) -> dict[str, Quantization]:
    """By node; `base` is how products are quantized."""
    q = replace(base, bits=8 if in_8_bits else base.bits, half_quadratic=False, taken=None)
    return dict.fromkeys(expert_nodes(arch), q)


def against_experts(
    arch: Arch, provider: str, nodes: Mapping[str, Quantization], *, quantized: bool, asked_for_8_bits: bool
) -> list[str]:
    """What the options or the provider (by onnxruntime-genai's name) want that experts do not have."""
    mixture, family = arch.mixture, arch.family.model_type
    if mixture is None:
        return [f"use_8bits_moe is for mixtures of experts, and {family} is none; leave it out"] * asked_for_8_bits
    found = []
    if asked_for_8_bits and not quantized:
        found.append("use_8bits_moe has an effect at precision int4 only")
    if provider == "dml":
        found.append(f"{family} has experts, and DirectML has no MoE or QMoE; use CPUExecutionProvider")
    experts = [q for name in expert_nodes(arch) if (q := nodes.get(name)) is not None]
    if provider == "webgpu" and len(experts) < sum(mixture.layers):
        found.append(f"{family} has experts, and WebGPU's MoE does not compute in floating point; use int4 or int8")
    if provider == "webgpu" and not mixture.normalized:
        found.append(f"{family} weights experts by a softmax over all of them, which WebGPU's QMoE does not know")
    for q in experts[:1]:
        ragged = [k for k in expert_columns(arch) if k % q.block_size]
        if any(k * q.bits % 8 for k in expert_columns(arch)):
            found.append(f"experts of {' and '.join(map(str, expert_columns(arch)))} columns do not fill whole bytes")
        if provider == "webgpu" and not q.symmetric:
            found.append("WebGPU's QMoE takes no zero points: leave int4_is_symmetric out")
        if provider in ("cuda", "webgpu") and ragged:
            found.append(f"experts of {ragged[0]} columns are no whole blocks of {q.block_size}, as {provider} wants")
        if provider == "cuda" and q.block_size not in (32, 64, 128):
            found.append(f"experts on CUDA have blocks of 32, 64 or 128, got {q.block_size}")
    return found


def expert_notes(arch: Arch, form: Form) -> tuple[str, ...]:
    """What is to be said of the experts."""
    mixture = arch.mixture
    if mixture is None:
        return ()
    experts = [form.nodes.get(name) for name in expert_nodes(arch)]
    count = f"{mixture.top_k} of {mixture.experts} experts a token, in {len(experts)} of {arch.layers} layers"
    found = [f"{count}; only these are computed, routers stay in {form.io}"]
    for q in [q for q in experts if q is not None][:1]:
        found[0] += f", experts at {q.bits} bits"
        ragged = [k for k in expert_columns(arch) if k % q.block_size]
        if form.qdq:
            found.append("experts stay with QMoE: there are no standard operators for them")
        if any(other.half_quadratic for other in form.nodes.values()):
            found.append("experts have whole zero points, from k_quant: QMoE takes no others")
        if ragged:
            found.append(
                f"experts of {ragged[0]} columns are no whole blocks of {q.block_size}: the kernel dequantizes them at "
                "every step, which is slow; choose a block size that divides"
            )
    return tuple(found)
