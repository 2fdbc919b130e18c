"""What ModelBuilder's options come to: the graph's form for a model and a provider, and every reason against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from coldpress.artifacts.arch import Arch
from coldpress.artifacts.arch_config import arch_from_config
from coldpress.artifacts.base import AdapterSpec
from coldpress.artifacts.stored import Packing
from coldpress.errors import PlanError
from coldpress.graph.form import EMBEDDING, HEAD, FloatType, Form, Quantization, mixed_layers, products
from coldpress.passes.builder_config import PROFILES, ModelBuilderConfig
from coldpress.passes.builder_experts import against_experts, expert_columns, expert_notes, experts_quantized
from coldpress.passes.builder_extra import translated
from coldpress.passes.builder_prompt import against_prompt_graph, prompt_form, prompt_note
from coldpress.passes.builder_providers import PROVIDERS, Provider, against_embedding, limited, missing, provider_of
from coldpress.passes.builder_taken import take_over
from coldpress.registry import nearest

__all__ = ["Choice", "choose", "main_quantization", "resolve"]

_REFUSED: Mapping[str, str] = {
    "metadata_only": "metadata_only takes an ONNX model that another pass made, and none here makes one; leave it out: "
    "ModelBuilder writes genai_config.json beside the model",
}
_HALF: Mapping[str, FloatType] = {"fp16": "float16", "bf16": "bfloat16"}
_CANDIDATES = 5
"""Scales that k_quant tries for a block. On phi3-7m, block 32: KL 0.0197 with 1, 0.0178 with 5, 7 and 19."""


@dataclass(frozen=True)
class Choice:
    """What a config comes to for one model and provider."""

    arch: Arch
    form: Form
    provider: str
    """onnxruntime-genai's name of it."""
    notes: tuple[str, ...]
    spinning: bool
    """Of the runtime's threads, on the CPU."""
    prompt: Form | None = None
    """Of the graph for prompts, where there is one."""


def main_quantization(form: Form) -> Quantization:
    """That of most products that are quantized here; where all are taken over, theirs."""
    return next((q for q in form.nodes.values() if q.taken is None), next(iter(form.nodes.values())))


def resolve(config: ModelBuilderConfig) -> tuple[ModelBuilderConfig, tuple[str, ...]]:
    """The config with extra_options worked in; raises PlanError with every option that is unknown or not built."""
    extra, problems = translated(config.extra_options, config.int4_algo_config)
    if not problems:
        try:
            config = ModelBuilderConfig.model_validate({**config.model_dump(exclude={"extra_options"}), **extra})
        except ValueError as error:
            problems.append(f"extra_options: {error}")
    problems += [reason for name, reason in _REFUSED.items() if getattr(config, name)]
    if config.int4_algo_config == "k_quant_linear":
        problems.append("k_quant_linear is for models with linear attention; the nearest is k_quant_mixed")
    unknown = set(config.int4_op_types_to_quantize or ()) - {"MatMul", "Gather"}
    if unknown:
        problems.append(f"int4_op_types_to_quantize knows MatMul and Gather, got {', '.join(sorted(unknown))}")
    _raise(problems)
    return config, tuple(config.extra_options)


def _raise(problems: list[str]) -> None:
    if problems:
        raise PlanError("ModelBuilder: " + "\n  ".join(problems))


def choose(
    config: ModelBuilderConfig,
    hf_config: Mapping[str, Any],
    provider_name: str,
    adapter: AdapterSpec | None = None,
    packings: Mapping[str, Packing | str] = MappingProxyType({}),
) -> Choice:
    """Graph form for a config, a model and a provider; raises PlanError with every reason against it.

    `packings`: the checkpoint's quantized weights, see `artifacts.quantized`.
    """
    config, _ = resolve(config)
    arch = arch_from_config(hf_config)
    problems: list[str] = []
    kernels = provider_of(provider_name)
    if isinstance(kernels, str):
        problems.append(kernels)
        kernels = PROVIDERS["CPUExecutionProvider"]
    provider = kernels.key
    arch, cut = limited(kernels, arch)
    io: FloatType = _HALF.get(config.precision, "float32")
    quantized = config.precision in ("int4", "int8")
    if config.fuse_mlp_gate_up and not arch.family.gated:
        problems.append(f"fuse_mlp_gate_up: {arch.family.model_type} has no gate projection")
    if config.prune_lm_head and not _has_head(config):
        problems.append("prune_lm_head has nothing to prune with exclude_lm_head")
    if config.allow_spinning is not None and provider != "cpu":
        problems.append("allow_spinning is for CPUExecutionProvider")
    if config.profile != "balanced" and provider != "cpu":
        problems.append(f"profile {config.profile} is measured on the CPU only; leave it out")
    if config.profile == "accurate" and config.precision != "int4":
        problems.append(f"profile accurate has no effect at precision {config.precision}; leave it out")
    if provider == "cpu" and arch.head_dim % 8:
        problems.append(f"head size {arch.head_dim}: ONNX Runtime's attention kernel wants a multiple of 8")
    if provider == "cpu":
        problems += _against_cpu(config)
    problems += _wrong_provider(config, provider)
    if quantized:
        io = "bfloat16" if config.use_cuda_bf16 else "float32" if config.use_webgpu_fp32 else kernels.quantized_io
    else:
        problems += _without_quantization(config)
    if config.padding == "left":
        problems += _against_left_padding(config, provider)
    profile = PROFILES[config.profile]
    form = Form(
        io=io,
        packed_qkv=not config.disable_qkv_fusion,
        fused_gate_up=_either(config.fuse_mlp_gate_up, profile.fused and arch.family.gated),
        prune_head=_either(config.prune_lm_head, profile.pruned and config.padding == "right" and _has_head(config)),
        left_padding=config.padding == "left",
        exclude_embeds=config.exclude_embeds,
        exclude_lm_head=config.exclude_lm_head,
        include_hidden_states=config.include_hidden_states,
        qdq=config.use_qdq,
    )
    form = kernels.form(form)
    if provider != "cpu":
        problems += missing(kernels, arch, form)
    nodes, more = _nodes(config, arch, form, kernels) if quantized else ({}, [])
    more += against_experts(arch, provider, nodes, quantized=quantized, asked_for_8_bits=config.use_8bits_moe)
    lora_modules, against = _lora_modules(config, arch, adapter)
    if config.prompt_graph:
        more += against_prompt_graph(config, arch, replace(form, nodes=nodes), provider)
    _raise(problems + more + against)
    form, taken = take_over(
        arch,
        replace(form, nodes=nodes, lora_modules=lora_modules),
        packings,
        block_size=config.int4_block_size,
        symmetric=config.int4_is_symmetric,
    )
    notes = (*taken, *_notes(config, arch, form, kernels), *expert_notes(arch, form), *cut,
             *_adapter_notes(form, adapter))  # fmt: skip
    spinning = provider == "cpu" and _either(config.allow_spinning, profile.spinning)
    prompt = prompt_form(form) if config.prompt_graph else None
    if prompt is not None:
        notes = (*notes, prompt_note(arch, prompt))
    return Choice(arch, form, provider, notes, spinning, prompt)


def _lora_modules(
    config: ModelBuilderConfig, arch: Arch, adapter: AdapterSpec | None
) -> tuple[frozenset[str], list[str]]:
    """Linear layers that get LoRA inputs, and what speaks against them."""
    if config.adapter == "merge":
        odd = config.adapter_modules is not None
        return frozenset(), ["adapter_modules is for adapter: inputs; leave it out, or say so"] if odd else []
    if adapter is not None and adapter.kind != "LoRA":
        reason = f"the adapter holds more than LoRA on linear layers: {adapter.kind}; leave adapter: inputs out"
        return frozenset(), [reason]
    modules = config.adapter_modules
    if modules is None:
        modules = () if adapter is None else adapter.target_modules
    if not modules:
        return frozenset(), ["adapter: inputs needs a model with an adapter, or adapter_modules"]
    known = {
        part.tensor.removesuffix(".weight").rpartition(".")[2]
        for name, linear in products(arch)
        for part in linear.parts
        if not (name == HEAD and arch.tied)
    }
    unknown = sorted(set(modules) - known)
    problems = []
    if unknown:
        problems.append(
            f"adapter: inputs cannot reach {', '.join(unknown)}; adapters may change {', '.join(sorted(known))}"
        )
    return frozenset(modules), problems


def _adapter_notes(form: Form, adapter: AdapterSpec | None) -> tuple[str, ...]:
    if form.lora_modules:
        modules = ", ".join(sorted(form.lora_modules))
        return (f"adapters are inputs, for {modules}; without one the graph is the base model",)
    return () if adapter is None else ("the adapter is merged while the weights are streamed, in float32",)


def _either(given: bool | None, otherwise: bool) -> bool:
    return otherwise if given is None else given


def _has_head(config: ModelBuilderConfig) -> bool:
    return not config.exclude_lm_head


def _against_left_padding(config: ModelBuilderConfig, provider: str) -> list[str]:
    found = []
    if provider != "cpu":
        found.append("padding: left is built for the CPU only")
    if config.prune_lm_head:
        found.append("prune_lm_head takes the last token of rows padded on the right; with padding: left leave it out")
    if config.allow_spinning is not None:
        found.append("allow_spinning is for genai_config.json, which a model with padding: left does not have")
    if config.search is not None:
        found.append("search is for genai_config.json, which a model with padding: left does not have")
    return found


def _against_cpu(config: ModelBuilderConfig) -> list[str]:
    found = []
    if config.precision == "bf16":
        found.append(
            "precision bf16 does not run on the CPU: ONNX Runtime 1.32 has no bf16 MatMul or GroupQueryAttention "
            "there; use fp32, int8 or int4, or CUDAExecutionProvider"
        )
    if config.precision == "fp16":
        found.append(
            "precision fp16 is not for the CPU: ONNX Runtime computes it in fp32 there, so it is no faster; "
            "use fp32, int8 or int4, or CUDAExecutionProvider"
        )
    return found


def _wrong_provider(config: ModelBuilderConfig, provider: str) -> list[str]:
    wanted = {"use_cuda_bf16": "CUDA", "enable_cuda_graph": "CUDA", "use_webgpu_fp32": "WebGpu"}
    return [
        f"{option} wants {name}ExecutionProvider"
        for option, name in wanted.items()
        if getattr(config, option) and provider != name.lower()
    ]


def _without_quantization(config: ModelBuilderConfig) -> list[str]:
    given = sorted(
        name for name in type(config).model_fields if name.startswith("int4_") and getattr(config, name) is not None
    )
    found = [f"{name} has no effect at precision {config.precision}; it is for int4 and int8" for name in given]
    if config.use_cuda_bf16:
        found.append(f"use_cuda_bf16 is for int4 and int8; for {config.precision} say precision: bf16")
    if config.use_webgpu_fp32:
        found.append("use_webgpu_fp32 is for int4 and int8; for fp32 throughout say precision: fp32")
    if config.use_qdq:
        found.append(f"use_qdq has no effect at precision {config.precision}; it is for int4 and int8")
    if config.shared_embeddings is not None:
        found.append(f"shared_embeddings has no effect at precision {config.precision}: tied matrices are one there")
    return found


def _quantization(config: ModelBuilderConfig, arch: Arch, kernels: Provider) -> Quantization:
    block_size: int | None = config.int4_block_size
    if block_size is None:
        wanted = 128 if config.precision == "int8" else PROFILES[config.profile].block_size
        columns = (*(linear.k for _, linear in products(arch)), *expert_columns(arch))
        wide = all(k % wanted == 0 for k in columns)
        block_size = wanted if wide else 32
    level: int | None = config.int4_accuracy_level
    algorithm = _algorithm(config)
    by_profile = config.precision != "int4" or PROFILES[config.profile].symmetric
    symmetric = algorithm != "hqq" and kernels.symmetric and by_profile
    return Quantization(
        bits=4 if config.precision == "int4" else 8,
        block_size=block_size,
        symmetric=_either(config.int4_is_symmetric, symmetric),
        accuracy_level=(4 if kernels.key == "cpu" else 0) if level is None else level,
        candidates=_CANDIDATES if algorithm.startswith(("k_quant", "hqq")) else 1,
    )


def _algorithm(config: ModelBuilderConfig) -> str:
    if config.int4_algo_config is not None:
        return config.int4_algo_config
    return PROFILES[config.profile].algorithm if config.precision == "int4" else "rtn"


def _nodes(
    config: ModelBuilderConfig, arch: Arch, form: Form, kernels: Provider
) -> tuple[dict[str, Quantization], list[str]]:
    """How each quantized node is quantized, and what speaks against the choice."""
    base, provider = _quantization(config, arch, kernels), kernels.key
    names = [name for name, _ in products(arch, form)]
    types = config.int4_op_types_to_quantize
    nodes = dict.fromkeys(names, base) if types is None or "MatMul" in types else {}
    experts = experts_quantized(arch, base, in_8_bits=config.use_8bits_moe)
    nodes |= experts if nodes else {}
    known = (*names, *experts, EMBEDDING)
    problems: list[str] = []
    if types is not None and "Gather" in types:
        nodes[EMBEDDING] = base
    elif types is None and provider == "cpu":
        # KL with the embedding at 4 and 8 bits and in floating point: phi3-7m 0.0206, 0.0178, 0.0178; stories1M 0.124,
        # 0.079, 0.078. ONNX Runtime's CUDA provider is not known to gather 8-bit blocks.
        nodes[EMBEDDING] = replace(base, bits=8)
    algorithm = _algorithm(config)
    if algorithm.endswith(("_last", "_down", "_mixed")) and nodes:
        raised = {HEAD, *(() if algorithm.endswith("_last") else mixed_layers(arch))}
        if algorithm.endswith("_down"):
            raised = {name for name in raised if name == HEAD or "/mlp/down" in name}
        raised &= set(nodes)
        nodes |= {name: replace(base, bits=8) for name in raised}
        if not raised and config.int4_algo_config is not None:
            problems.append(f"int4_algo_config {algorithm}: the options leave nothing to quantize that it would raise")
    shared = config.shared_embeddings
    by_profile = PROFILES[config.profile].shared and provider == "cpu" and not config.use_qdq
    shares = _either(shared, by_profile and types is None and arch.tied)
    if shares:
        nodes[EMBEDDING] = nodes.get(HEAD, base)
    if algorithm == "hqq":  # GatherBlockQuantized takes no zero points that are floats
        fitted = {name for name in names if name in nodes and not (shares and name == HEAD)}
        nodes |= {name: replace(base, candidates=1, half_quadratic=True) for name in fitted}
    problems += _against_quantization(config, kernels, form, nodes.get(EMBEDDING), arch.hidden)
    if shared and not arch.tied:
        problems.append("shared_embeddings: config.json says that head and embedding are different matrices")
    if shared and (config.exclude_embeds or config.exclude_lm_head):
        problems.append("shared_embeddings wants both embedding and head, and the options leave one out")
    for name in config.int4_nodes_to_exclude or ():
        if name not in known:
            close = nearest(name, known)
            problems.append(
                f"int4_nodes_to_exclude names {name!r}, which the graph does not have"
                + (f"; the nearest is {close}" if close else f"; it has {EMBEDDING}, {HEAD}, {names[0]} ...")
            )
        nodes.pop(name, None)
    if config.exclude_embeds:
        nodes.pop(EMBEDDING, None)
    if config.exclude_lm_head:
        nodes.pop(HEAD, None)
    if not nodes and not problems:
        problems.append(f"precision {config.precision}, but the options leave nothing to quantize; say fp32")
    return nodes, problems


def _against_quantization(
    config: ModelBuilderConfig, kernels: Provider, form: Form, embedding: Quantization | None, hidden: int
) -> list[str]:
    """What the options want of quantized products and the provider's kernels do not do."""
    found, name = [], kernels.full_name
    if _algorithm(config) == "hqq":
        if config.precision != "int4":
            found.append(
                "hqq is for int4: ONNX Runtime 1.32 takes no float zero points at 8 bits, where rtn loses next to none"
            )
        if config.int4_is_symmetric:
            found.append("hqq fits zero points, which int4_is_symmetric leaves out; the nearest is k_quant")
        if config.use_qdq:
            found.append("hqq has float zero points, which DequantizeLinear does not take; the nearest is k_quant")
        if not kernels.float_zeros:
            found.append(f"hqq has float zero points, which {name}'s MatMulNBits does not take; the nearest is k_quant")
    if config.int4_is_symmetric and not kernels.symmetric and not config.use_qdq:
        found.append(f"{name}'s MatMulNBits wants zero points: leave int4_is_symmetric out")
    if embedding is not None and (reason := against_embedding(kernels, embedding, hidden)) is not None:
        found.append(reason)
    if config.use_qdq and form.io not in kernels.dequantizes:
        found.append(f"{name} does not dequantize blocks of 4 bits to {form.io}: leave use_qdq out")
    if config.use_qdq and config.shared_embeddings:
        found.append("use_qdq keeps the head transposed, so that it cannot be the embedding: leave one of the two out")
    return found


def _notes(config: ModelBuilderConfig, arch: Arch, form: Form, kernels: Provider) -> tuple[str, ...]:
    found = []
    if config.precision == "int4" and not form.left_padding and PROFILES[config.profile].measured:
        found.append(f"profile {config.profile}, as measured: {PROFILES[config.profile].measured}")
    if form.nodes and (q := main_quantization(form)).taken is None:
        scales = "scale from the peak" if q.candidates == 1 else f"best of {q.candidates} scales"
        if q.half_quadratic:
            scales = "zero points fitted (HQQ), floats"
        found.append(
            f"{config.precision} weights, block {q.block_size}, {'symmetric' if q.symmetric else 'asymmetric'}, "
            f"{scales}; activations {form.io}"
        )
        ragged = sorted({linear.k for _, linear in products(arch, form) if linear.k % q.block_size})
        if ragged:
            found.append(
                f"rows of {', '.join(map(str, ragged))} weights are filled up to whole blocks of {q.block_size}"
            )
    if form.nodes and not form.exclude_embeds:
        stored = form.nodes.get(EMBEDDING)
        how = form.io if stored is None else f"{stored.bits} bits"
        found.append(f"embedding at {how}" + (", shared with the head" if form.shares_embedding(arch) else ""))
    if any(q.half_quadratic for q in form.nodes.values()) and kernels.key == "cpu":
        # ONNX Runtime 1.32, one thread, 2048 by 2048: 11 ms for one token instead of 0.2, 12 for 128 instead of 5 to 7.
        found.append("zero points that are floats run many times slower on the CPU, which computes them in fp32")
    if form.nodes and form.qdq:
        found.append("products through DequantizeLinear and MatMul; the embedding through GatherBlockQuantized")
    if kernels.key != "cpu":
        found.append(f"built for {kernels.full_name}: such graphs are tested in structure, and were not run")
    if form.prune_head:
        found.append("logits of the last token only; a second graph over the same data keeps all, for evaluation")
    if form.left_padding:
        found.append("for plain ONNX Runtime, with position_ids; onnxruntime-genai does not run it")
    else:
        found.append("batches must be padded on the right: the attention kernel counts valid tokens from the left")
    if arch.rope.kind == "dynamic":
        found.append(f"dynamic rope is exact up to {arch.context_length} tokens, which is the model's context here")
    return tuple(found)
