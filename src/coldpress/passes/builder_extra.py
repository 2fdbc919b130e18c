"""`extra_options` of onnxruntime-genai's builder, under its names: what each is here, or why it is refused.

The names are those that builder.py of onnxruntime-genai 0.18 documents under --extra_options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldpress.registry import nearest

__all__ = ["translated"]

# Name in extra_options -> option. The builder knows them with and without "int4_".
_SAME: Mapping[str, str] = {
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
            "exclude_lm_head", "enable_cuda_graph", "shared_embeddings", "prune_lm_head", "fuse_mlp_gate_up",
            "disable_qkv_fusion",
        )
    },
    "config_only": "metadata_only",
}  # fmt: skip
_OTHERS = ("fuse_qkv", "matmul_mixed_precision", "moe_quant_type")
_SEPARATOR: Mapping[str, str] = {"int4_op_types_to_quantize": "/", "int4_nodes_to_exclude": ","}
_TRUTHS: Mapping[str, bool] = {"0": False, "false": False, "1": True, "true": True}

_DRAFTS = "drafting tokens for another model to verify is not built; build the model without it"
_PAGED = "PagedAttention is for onnxruntime-genai's CUDA engine and is not built; the nearest is GroupQueryAttention, "
_PAGED += "which is built without the option"
_LINEAR = "it is for models with linear attention, and the builder has no such family"
_LAYOUT = "it lays weights out for one generation of GPUs; the plain blocks that are written here run on all of them"
_CAPTURE = "capturing a graph wants every node on the device, and lengths are counted on the CPU here"
_CACHE = "the KV cache stays in floating point: a quantized one is not built"
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("aux_hidden_state_layers", "dflash2_path", "dflash2_num_draft_tokens", "dflash2_fuse_gate_up",
         "dflash2_fuse_qkv", "dflash2_precision", "dspark_path", "dspark_num_draft_tokens", "dspark_top_k",
         "exclude_mtp", "max_draft_tokens", "mtp_quant_config"),
        _DRAFTS,
    ),
    **dict.fromkeys(
        ("use_paged_attention", "paged_block_size", "paged_chunk_size", "gpu_utilization_factor", "max_batch_size",
         "max_scheduled_tokens", "num_blocks"),
        _PAGED,
    ),
    **dict.fromkeys(("linear_attn_op", "state_update_capacity", "state_window"), _LINEAR),
    **dict.fromkeys(
        ("matmulnbits_weights_prepacked", "qmoe_weights_prepacked", "enable_cuda_fpa_intb_gemm"), _LAYOUT
    ),
    **dict.fromkeys(("enable_dml_graph", "enable_webgpu_graph"), _CAPTURE),
    **dict.fromkeys(("kv_cache_quant_scheme", "kv_cache_rotation", "kv_cache_scale_file"), _CACHE),
    "qmoe_block_size": "experts have the blocks of int4_block_size; set that",
    "fuse_qk_norm_gqa": "norms of query and key are nodes of their own, as with false; leave it out",
    "windowed_kv_cache": "every layer has a KV cache of full length, as with false; leave it out",
    "use_device_allocator_for_initializers": "it changes nothing but a line of genai_config.json: write "
    '"session.use_device_allocator_for_initializers": "1" into session_options there',
    "num_hidden_layers": "it cuts the model short; a shorter model is another checkpoint",
    "filename": "the graph is model.onnx, and evaluation looks for it under this name; rename it afterwards",
    "hf_token": "set hf_token of the system, which reads the token from HF_TOKEN",
    "hf_remote": "the builder reads config.json and weights only and runs no code of a repository; leave it out",
    "adapter_path": "set adapter_path of the input model; adapter says what becomes of it",
}  # fmt: skip


def translated(extra: Mapping[str, Any], algorithm: str | None) -> tuple[dict[str, Any], list[str]]:
    """Our options, and what speaks against those that are unknown or refused; `algorithm` is int4_algo_config."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in extra.items():
        if key in _SAME:
            values[_SAME[key]] = _parsed(_SAME[key], value)
        elif key == "fuse_qkv":
            fused = _TRUTHS.get(str(value).lower())
            if fused is None:
                problems.append(f"extra_options.fuse_qkv is {value!r}, must be true or false")
            else:
                values["disable_qkv_fusion"] = not fused
        elif key == "moe_quant_type" and value in ("int4", "int8"):
            values["use_8bits_moe"] = value == "int8"
        elif key == "moe_quant_type":
            problems.append(f"extra_options.moe_quant_type {value} is not built; the nearest is int4, or int8")
        elif key in _REFUSED:
            problems.append(f"extra_options.{key}: {_REFUSED[key]}")
        elif key != "matmul_mixed_precision":
            known = (*_SAME, *_OTHERS)
            close = nearest(key, known)
            near = f"; the nearest is {close}" if close else f"; built are {', '.join(sorted(known))}"
            problems.append(f"extra_options.{key} is not built{near}")
    mixed = extra.get("matmul_mixed_precision")
    if mixed:
        chosen = _mixed(str(mixed), str(values.get("int4_algo_config") or algorithm or "k_quant"))
        if chosen is None:
            problems.append(
                f"extra_options.matmul_mixed_precision {mixed} is not built with this algorithm; built are "
                f"last_matmul:int8 with rtn and k_quant, and last_matmul:int8,mixed_layers:int8 with k_quant"
            )
        values["int4_algo_config"] = chosen
    return values, problems


def _parsed(option: str, value: Any) -> Any:
    """The builder's command line gives text: lists with a separator, numbers in digits."""
    if not isinstance(value, str):
        return value
    if option in _SEPARATOR:
        return tuple(value.split(_SEPARATOR[option]))
    if option in ("int4_accuracy_level", "int4_block_size") and value.lstrip("-").isdigit():
        return int(value)
    return value


def _mixed(text: str, algorithm: str) -> str | None:
    """The algorithm that keeps the same products at 8 bits."""
    base = "rtn" if algorithm == "default" else algorithm
    found = frozenset(part.strip() for part in text.split(","))
    if found == {"last_matmul:int8"} and base in ("rtn", "k_quant"):
        return f"{base}_last"
    if found == {"last_matmul:int8", "mixed_layers:int8"} and base == "k_quant":
        return "k_quant_mixed"
    return None
