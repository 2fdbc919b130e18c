"""What ModelBuilder's options come to: the graph's form for a model and a provider, and every reason against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from coldpress.artifacts.arch import Arch
from coldpress.artifacts.arch_config import arch_from_config
from coldpress.config.schema import Frozen
from coldpress.errors import PlanError
from coldpress.graph.form import EMBEDDING, HEAD, FloatType, Form, Quantization, mixed_layers, products
from coldpress.registry import nearest

__all__ = ["Choice", "ModelBuilderConfig", "choose", "main_quantization", "resolve"]

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Algorithm = Literal["default", "rtn", "rtn_last", "k_quant", "k_quant_last", "k_quant_mixed", "k_quant_linear"]


class ModelBuilderConfig(Frozen):
    """Parameters of ModelBuilder."""

    precision: Precision
    """Of the weights. On the CPU fp32, int8 or int4; on CUDA also fp16 and bf16. int8 and int4 compute in fp32 on the
    CPU and in fp16 on CUDA."""
    metadata_only: bool = False
    """Write only the GenAI files for an ONNX model that is there already. Not built."""
    search: Mapping[str, Any] | None = None
    """Laid over the `search` section of genai_config.json (max_length, temperature ...)."""
    int4_accuracy_level: Literal[0, 1, 2, 3, 4] | None = None
    """What quantized products compute in: 1 fp32, 2 fp16, 3 bf16, 4 int8, 0 the kernel's choice; null: 4 on the CPU, 0
    on CUDA. For int8 weights too."""
    int4_block_size: Literal[16, 32, 64, 128, 256] | None = None
    """Weights that share a scale, for int4 and int8; null: 32 for int4, 128 for int8 (32 where rows do not divide)."""
    int4_is_symmetric: bool | None = None
    """False stores a zero point for each block; null: true."""
    int4_op_types_to_quantize: tuple[str, ...] | None = None
    """MatMul, Gather or both; null: MatMul, and on the CPU the embedding at 8 bits. Gather quantizes the embedding at
    the bits of `precision`; a head that is tied to it then shares its bytes."""
    int4_nodes_to_exclude: tuple[str, ...] | None = None
    """Nodes to keep in floating point: `/lm_head/MatMul`, `/model/layers.0/attn/qkv_proj/MatMul` ..."""
    int4_algo_config: Algorithm | None = None
    """default and rtn take each block's scale from its greatest weight; k_quant tries five scales and takes the one
    with the least squared error. `_last` keeps the head at 8 bits, `_mixed` also every third qkv and down projection
    and those of the first and last layers. null is k_quant for int4, rtn for int8."""
    use_qdq: bool = False
    """DequantizeLinear + MatMul instead of MatMulNBits. Not built."""
    use_8bits_moe: bool = False
    """Experts at 8 bits. There is no mixture of experts among the families yet."""
    use_webgpu_fp32: bool = False
    """fp32 activations for WebGPU, which is not built."""
    use_cuda_bf16: bool = False
    """CUDA with int4 or int8 weights: activations in bf16 instead of fp16."""
    include_hidden_states: bool = False
    """Give out the hidden states besides the logits."""
    exclude_embeds: bool = False
    """Leave the embedding out: the input is `inputs_embeds`."""
    exclude_lm_head: bool = False
    """Leave the head out: the output is `hidden_states`."""
    enable_cuda_graph: bool | None = None
    """CUDA: let genai_config.json ask for CUDA graphs."""
    extra_options: Mapping[str, Any] = Field(default_factory=dict)
    """The same options under the names of onnxruntime-genai's builder; they win over the ones above."""


# Name in extra_options -> option. The builder knows them with and without "int4_".
_EXTRA: Mapping[str, str] = {
    **{
        f"{prefix}{name}": f"int4_{name}"
        for prefix in ("", "int4_")
        for name in (
            "accuracy_level", "block_size", "is_symmetric", "op_types_to_quantize", "nodes_to_exclude", "algo_config"
        )
    },
    **{
        name: name
        for name in (
            "use_qdq", "use_8bits_moe", "use_webgpu_fp32", "use_cuda_bf16", "include_hidden_states", "exclude_embeds",
            "exclude_lm_head", "enable_cuda_graph",
        )
    },
    "config_only": "metadata_only",
}  # fmt: skip
_SEPARATOR: Mapping[str, str] = {"int4_op_types_to_quantize": "/", "int4_nodes_to_exclude": ","}

_REFUSED: Mapping[str, str] = {
    "metadata_only": "metadata_only takes an ONNX model that another pass made, and none here makes one; leave it out: "
    "ModelBuilder writes genai_config.json beside the model",
    "use_qdq": "use_qdq is not built; the nearest is the default, MatMulNBits nodes, which ONNX Runtime's CPU and CUDA "
    "providers run without rewriting",
    "use_8bits_moe": "use_8bits_moe is for mixtures of experts, and the builder has no such family; leave it out",
    "use_webgpu_fp32": "use_webgpu_fp32 is for WebGPU, which is not built; the nearest is the CPU, where int4 and int8 "
    "models compute in fp32",
}
_PROVIDERS: Mapping[str, Literal["cpu", "cuda"]] = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
_HALF: Mapping[str, FloatType] = {"fp16": "float16", "bf16": "bfloat16"}
_CANDIDATES = 5
"""Scales that k_quant tries for a block. On phi3-7m, block 32: KL 0.0197 with 1, 0.0178 with 5, 7 and 19."""


@dataclass(frozen=True)
class Choice:
    """What a config comes to for one model and provider."""

    arch: Arch
    form: Form
    provider: Literal["cpu", "cuda"]
    notes: tuple[str, ...]


def main_quantization(form: Form) -> Quantization:
    """That of most products."""
    return next(iter(form.nodes.values()))


def resolve(config: ModelBuilderConfig) -> tuple[ModelBuilderConfig, tuple[str, ...]]:
    """The config with extra_options worked in; raises PlanError with every option that is unknown or not built."""
    values, problems = config.model_dump(exclude={"extra_options"}), []
    for key, value in config.extra_options.items():
        if key not in _EXTRA:
            close = nearest(key, _EXTRA)
            near = f"; the nearest is {close}" if close else f"; built are {', '.join(sorted(_EXTRA))}"
            problems.append(f"extra_options.{key} is not built{near}")
            continue
        option = _EXTRA[key]
        if isinstance(value, str):
            # The builder's command line gives text: 1/0 and true/false, lists with a separator.
            if option in _SEPARATOR:
                value = tuple(value.split(_SEPARATOR[option]))
            elif value.lstrip("-").isdigit() and option in ("int4_accuracy_level", "int4_block_size"):
                value = int(value)
        values[option] = value
    if not problems:
        try:
            config = ModelBuilderConfig.model_validate(values)
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


def choose(config: ModelBuilderConfig, hf_config: Mapping[str, Any], provider_name: str) -> Choice:
    """Graph form for a config, a model and a provider; raises PlanError with every reason against it."""
    config, _ = resolve(config)
    arch = arch_from_config(hf_config)
    problems: list[str] = []
    provider = _PROVIDERS.get(provider_name)
    if provider is None:
        problems.append(f"{provider_name} is not built; the builder has: {', '.join(_PROVIDERS)}")
        provider = "cpu"
    io: FloatType = _HALF.get(config.precision, "float32")
    quantized = config.precision in ("int4", "int8")
    if provider == "cpu":
        problems += _against_cpu(config)
    elif quantized:
        io = "bfloat16" if config.use_cuda_bf16 else "float16"
    if not quantized:
        problems += _without_quantization(config)
    form = Form(
        io=io,
        exclude_embeds=config.exclude_embeds,
        exclude_lm_head=config.exclude_lm_head,
        include_hidden_states=config.include_hidden_states,
        rope_switch="position_ids" if provider == "cpu" else "if",
    )
    nodes, more = _nodes(config, arch, form, provider) if quantized else ({}, [])
    _raise(problems + more)
    form = replace(form, nodes=nodes)
    return Choice(arch, form, provider, _notes(config, arch, form, provider))


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
    if config.use_cuda_bf16:
        found.append("use_cuda_bf16 wants CUDAExecutionProvider")
    if config.enable_cuda_graph:
        found.append("enable_cuda_graph wants CUDAExecutionProvider")
    return found


def _without_quantization(config: ModelBuilderConfig) -> list[str]:
    given = sorted(
        name for name in type(config).model_fields if name.startswith("int4_") and getattr(config, name) is not None
    )
    found = [f"{name} has no effect at precision {config.precision}; it is for int4 and int8" for name in given]
    if config.use_cuda_bf16:
        found.append(f"use_cuda_bf16 is for int4 and int8; for {config.precision} say precision: bf16")
    return found


def _quantization(config: ModelBuilderConfig, arch: Arch, provider: str) -> Quantization:
    block_size: int | None = config.int4_block_size
    if block_size is None:
        wide = all(linear.k % 128 == 0 for _, linear in products(arch))
        block_size = 128 if config.precision == "int8" and wide else 32
    level: int | None = config.int4_accuracy_level
    algorithm = config.int4_algo_config or ("k_quant" if config.precision == "int4" else "rtn")
    return Quantization(
        bits=4 if config.precision == "int4" else 8,
        block_size=block_size,
        symmetric=config.int4_is_symmetric is not False,
        accuracy_level=(4 if provider == "cpu" else 0) if level is None else level,
        candidates=_CANDIDATES if algorithm.startswith("k_quant") else 1,
    )


def _nodes(
    config: ModelBuilderConfig, arch: Arch, form: Form, provider: str
) -> tuple[dict[str, Quantization], list[str]]:
    """How each quantized node is quantized, and what speaks against the choice."""
    base = _quantization(config, arch, provider)
    names = [name for name, _ in products(arch, form)]
    types = config.int4_op_types_to_quantize
    nodes = dict.fromkeys(names, base) if types is None or "MatMul" in types else {}
    if types is not None and "Gather" in types:
        nodes[EMBEDDING] = base
    elif types is None and provider == "cpu":
        # KL with the embedding at 4 and 8 bits and in floating point: phi3-7m 0.0206, 0.0178, 0.0178; stories1M 0.124,
        # 0.079, 0.078. ONNX Runtime's CUDA provider is not known to gather 8-bit blocks.
        nodes[EMBEDDING] = replace(base, bits=8)
    algorithm = config.int4_algo_config or ""
    if algorithm.endswith(("_last", "_mixed")) and nodes:
        raised = {HEAD, *(mixed_layers(arch) if algorithm.endswith("_mixed") else ())}
        nodes |= {name: replace(base, bits=8) for name in raised if name in nodes}
    problems = []
    for name in config.int4_nodes_to_exclude or ():
        if name not in (*names, EMBEDDING):
            close = nearest(name, (*names, EMBEDDING))
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


def _notes(config: ModelBuilderConfig, arch: Arch, form: Form, provider: str) -> tuple[str, ...]:
    found = []
    if form.nodes:
        q = main_quantization(form)
        scales = "scale from the peak" if q.candidates == 1 else f"best of {q.candidates} scales"
        found.append(
            f"{config.precision} weights, block {q.block_size}, {'symmetric' if q.symmetric else 'asymmetric'}, "
            f"{scales}; activations {form.io}"
        )
        if not form.exclude_embeds:
            stored = form.nodes.get(EMBEDDING)
            how = form.io if stored is None else f"{stored.bits} bits"
            found.append(f"embedding at {how}" + (", shared with the head" if form.shares_embedding(arch) else ""))
    if provider == "cuda":
        found.append("built for CUDA and checked in structure only where there is no GPU")
    found.append("batches must be padded on the right: the attention kernel counts valid tokens from the left")
    if arch.rope.kind == "dynamic":
        found.append(f"dynamic rope is exact up to {arch.context_length} tokens, which is the model's context here")
    return tuple(found)
