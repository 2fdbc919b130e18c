"""config.json to Arch: today's keys and the older ones, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coldpress.artifacts.arch import Mixture
from coldpress.artifacts.arch_config import arch_from_config
from coldpress.artifacts.families import FAMILIES
from coldpress.artifacts.tensors import TensorSet
from coldpress.errors import CheckpointError, UnsupportedModelError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
PHI3: dict[str, Any] = {**LLAMA, "model_type": "phi3", "max_position_embeddings": 128}


@pytest.mark.parametrize("name", ["phi3-7m", "stories1M-char361", "stories260K-hd16"])
def test_real_checkpoints_hold_what_the_table_expects(shared: Path, name: str) -> None:
    folder = shared / "models" / name
    arch = arch_from_config(json.loads((folder / "config.json").read_text()))
    with TensorSet.open(folder) as tensors:
        assert dict(arch.expected()) == {info.name: info.shape for info in tensors.infos()}


def test_defaults_are_those_of_the_config_class() -> None:
    arch = arch_from_config(LLAMA)
    assert (arch.kv_heads, arch.head_dim, arch.norm_eps, arch.context_length) == (4, 16, 1e-6, 2048)
    assert (arch.rope.kind, arch.rope.dim, arch.rope.theta) == ("default", 16, 10000.0)
    assert (arch.tied, arch.qkv_bias, arch.windows) == (False, False, (None, None))
    mistral = {**LLAMA, "model_type": "mistral", "num_key_value_heads": 4}
    assert arch_from_config(mistral).windows == (4096, 4096)
    assert arch_from_config({**mistral, "sliding_window": None}).windows == (None, None)


def test_fused_matrices_are_cut_in_the_order_of_their_rows() -> None:
    arch = arch_from_config({**PHI3, "num_key_value_heads": 2})
    assert [(part.tensor, part.first, part.count) for part in arch.qkv(1).parts] == [
        ("model.layers.1.self_attn.qkv_proj.weight", 0, 64 + 2 * 32)
    ]
    gate, up = arch.gate(0).parts[0], arch.up(0).parts[0]
    assert gate.tensor == up.tensor == "model.layers.0.mlp.gate_up_proj.weight"
    assert (gate.first, gate.count, up.first, up.count) == (0, 128, 128, 128)
    assert dict(arch.expected())["model.layers.0.mlp.gate_up_proj.weight"] == (256, 64)


def test_biases_belong_to_their_tensors() -> None:
    names = dict(arch_from_config({**LLAMA, "attention_bias": True, "mlp_bias": True}).expected())
    assert names["model.layers.0.self_attn.q_proj.bias"] == (64,)
    assert names["model.layers.1.mlp.down_proj.bias"] == (64,)
    assert not any(name.endswith("bias") for name, _ in arch_from_config(LLAMA).expected())


OLD_AND_NEW: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {**LLAMA, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 512}},
        {**LLAMA, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0,
         "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}},
    ),
    (
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {**LLAMA, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
    ),
    (
        {**PHI3, "original_max_position_embeddings": 32, "partial_rotary_factor": 0.5,
         "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        {**PHI3, "original_max_position_embeddings": 32, "rope_parameters": {"rope_theta": 10000.0,
         "rope_type": "longrope",
         "partial_rotary_factor": 0.5, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), OLD_AND_NEW)
def test_old_rope_keys_mean_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert arch_from_config(old) == arch_from_config(new)
    assert arch_from_config(new).rope.kind != "default"


def test_longrope_knows_both_factors_and_their_border() -> None:
    rope = arch_from_config(OLD_AND_NEW[2][0]).rope
    assert (rope.kind, rope.dim, rope.original_length) == ("longrope", 8, 32)
    assert rope.short_factors == (1.0,) * 4
    assert rope.long_factors == (2.0,) * 4
    assert rope.parameters == {"factor": 4.0, "original_length": 32}


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'mistrol'.*llama, ministral, mistral, .*nearest: mistral"):
        arch_from_config({**LLAMA, "model_type": "mistrol"})
    with pytest.raises(UnsupportedModelError, match="no model_type"):
        arch_from_config({})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_size": None}, CheckpointError, "config.json of the model.*: hidden_size is null, must be"),
        ({"num_hidden_layers": "six"}, CheckpointError, "num_hidden_layers is 'six', must be a whole number above 0"),
        ({"vocab_size": 1.5, "head_dim": -4}, CheckpointError, "vocab_size is 1.5, .*; head_dim is -4, must be"),
        ({"num_key_value_heads": True}, CheckpointError, "num_key_value_heads is True"),
        ({"rms_norm_eps": "small"}, CheckpointError, "rms_norm_eps is 'small', must be a number above 0"),
        ({"tie_word_embeddings": "false"}, CheckpointError, "tie_word_embeddings is 'false', must be true or false"),
        ({"rope_scaling": "linear"}, CheckpointError, "rope_scaling is 'linear', must be a mapping"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, CheckpointError, "factor is 'two', must be a number"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": 1, "long_factor": ["a"]}},
            CheckpointError,
            "short_factor must be a list of numbers above 0, got 1; long_factor must",
        ),
        ({"hidden_size": 66}, CheckpointError, "no multiple"),
        ({"num_key_value_heads": 3}, CheckpointError, "num_key_value_heads 3"),
        ({"hidden_act": ["silu"]}, UnsupportedModelError, r"hidden_act \['silu'\]"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "does not read it"),
        ({"num_hidden_layers": 10**9}, CheckpointError, "at most 10000"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, CheckpointError, "factor is 0, must be a number above 0"),
        ({"rope_theta": 1.0}, CheckpointError, "rope_theta finite and above 1"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [0.0] * 8}},
            CheckpointError,
            "long_factor must be a list of numbers above 0",
        ),
        ({"hidden_act": "relu2"}, UnsupportedModelError, "hidden_act 'relu2'"),
        ({"rope_scaling": {"rope_type": "spiral"}}, UnsupportedModelError, "rope type 'spiral'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, CheckpointError, "low_freq_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, CheckpointError, "8 factors"),
        ({"head_dim": 1}, CheckpointError, "rotary dimensions"),
    ],
)
def test_what_cannot_be_built_is_said(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        arch_from_config({**LLAMA, **change})


def test_rows_are_named_by_their_model_type() -> None:
    assert all(name == row.model_type for name, row in FAMILIES.items())


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # What matters of the config.json of published models, and what the builder must make of it.
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
         "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
         "max_window_layers": 24, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
         "tie_word_embeddings": True, "use_sliding_window": False, "hidden_act": "silu"},
        {"head_dim": 64, "qkv_bias": True, "o_bias": False, "tied": True, "windows": (None,) * 24},
    ),
    "gemma-2-2b": (
        {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256,
         "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
         "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8,
         "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
         "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000},
        {"tied": True, "activation": "gelu_tanh", "windows": (4096, None) * 13},
    ),
    "gemma-3-1b": (
        {"model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
         "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
         "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
         "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
         "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
         "vocab_size": 262144},
        {"tied": True, "windows": ((512,) * 5 + (None,)) * 4 + (512,) * 2},
    ),
    "pythia-160m": (
        {"model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
         "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 12, "num_hidden_layers": 12,
         "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True,
         "vocab_size": 50304},
        {"parallel": True, "qkv_bias": True, "tied": False, "activation": "gelu"},
    ),
    "Qwen3-30B-A3B": (
        {"model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
         "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
         "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
         "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
         "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
         "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936},
        {"windows": (None,) * 48, "qkv_bias": False, "mixture": Mixture(128, 8, 768, True, (True,) * 48)},
    ),
    "Mixtral-8x7B": (
        {"model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
         "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
         "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05,
         "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000},
        {"windows": (None,) * 32, "head_dim": 128, "mixture": Mixture(8, 2, 14336, True, (True,) * 32)},
    ),
    "gpt-oss-20b": (
        {"model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64,
         "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
         "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
         "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
         "num_local_experts": 32, "rms_norm_eps": 1e-05, "rope_theta": 150000, "sliding_window": 128,
         "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False,
                          "original_max_position_embeddings": 4096},
         "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088,
         "quantization_config": {"quant_method": "mxfp4"}},
        {"windows": (128, None) * 12, "qkv_bias": True, "o_bias": True,
         "mixture": Mixture(32, 4, 2880, True, (True,) * 24, 1.702, 1.0, 7.0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_as_they_were_published(name: str) -> None:
    config, expected = PUBLISHED[name]
    arch = arch_from_config(config)
    assert {key: getattr(arch, key) for key in expected} == expected
    if name == "gemma-3-1b":
        assert [arch.ropes[layer].theta for layer in (4, 5)] == [10000.0, 1000000.0]
        assert arch.scales.embedding == 1152**0.5
    if name == "pythia-160m":
        assert arch.rope.dim == 16
    if name == "gpt-oss-20b":
        assert (arch.rope.kind, arch.rope.theta, arch.rope.original_length) == ("yarn", 150000.0, 4096)
        assert arch.rope.parameters["truncate"] is False


def test_a_null_is_not_the_default() -> None:
    gemma = {**PUBLISHED["gemma-2-2b"][0], "attn_logit_softcapping": None, "final_logit_softcapping": None}
    assert (arch_from_config(gemma).scales.attention_cap, arch_from_config(gemma).scales.logits_cap) == (None, None)
    mistral = {**LLAMA, "model_type": "mistral", "num_key_value_heads": None}
    assert arch_from_config(mistral).kv_heads == 4
    assert arch_from_config({**LLAMA, "rope_parameters": {"rope_theta": None}}).rope.theta == 10000.0


def test_rope_scaling_beside_rope_parameters_wins() -> None:
    # As model cards advise; Transformers then drops the newer mapping.
    both = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "rope_scaling": {"rope_type": "linear", "factor": 4.0}}  # fmt: skip
    assert arch_from_config(both).rope == arch_from_config({**LLAMA, "rope_scaling": both["rope_scaling"]}).rope
