"""The decoder families that the builder knows, as rows of a table: weight names, kinds of norms, biases, scales.

    x       residual stream                            pre-norm   x + attention(norm(x)),  x + mlp(norm(x))
    norm    RMS or LayerNorm                           post-norm  x + norm(attention(x)),  x + norm(mlp(x))
    mlp     down(act(gate(x)) * up(x)), or             both       x + norm(attention(norm(x))) ...
            down(act(up(x))) where it has no gate      parallel   x + attention(norm(x)) + mlp(norm(x))

Which of these a family is follows from the names of its norms: a norm without a name is not there. Values come from
config.json; `defaults` are those of the Transformers config class, which writes only what differs from it. Each row
is held to Transformers' own model by tests/graph/test_parity.py. docs/families.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

__all__ = ["FAMILIES", "Experts", "Family", "Names", "Scales"]

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Names:
    """Weight names without `.weight` and `.bias`; those of a block are relative to its layer."""

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{}"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three names, or one when the checkpoint keeps query, key and value rows in one matrix."""
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Two names, or one when gate rows and then up rows are one matrix; of an MLP without gate the one name of up."""
    down: str = "mlp.down_proj"
    attention_norm: str | None = "input_layernorm"
    attention_out_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_out_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    sinks: str | None = None
    """A score for each head that takes part in the softmax and has no value; the name is complete."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of the MLP: down(act(gate(x)) * up(x)) of each, weighted by a router.

    Names are relative to the layer; `{}` is the number of an expert. Without it one tensor holds all experts, inputs
    first: [experts, hidden, 2 * inner], gate and up columns in turn, and [experts, inner, hidden].
    """

    router: str
    gate_up: tuple[str, ...]
    """Two names of matrices, or one tensor."""
    down: str
    bias: bool = False
    """Router and experts have biases: those of the experts are called like the tensors with `_bias` behind."""
    inner: str = "intermediate_size"
    """The config key of an expert's inner size."""
    normalized: bool | str = True
    """Weights of the chosen experts sum to 1; a text is the config key that says so."""
    layers: Callable[[Values, int], bool] = lambda values, layer: True
    """Which layers have experts; the others have a plain MLP."""
    clamped: bool = False
    """Gate and up are cut off at `swiglu_limit`; then it is gate * sigmoid(`swiglu_alpha` * gate) * (up + 1)."""


@dataclass(frozen=True)
class Scales:
    """Factors and caps of a model; None and 1 leave the node out."""

    embedding: float = 1.0
    """The embedding is multiplied by it."""
    in_embedding: bool = False
    """Whether that is part of the embedding, so that `inputs_embeds` have the factor already."""
    attention: float | None = None
    """Of the scores; None is 1 / sqrt(head size)."""
    residual: float = 1.0
    """What a block adds is multiplied by it."""
    logits: float = 1.0
    attention_cap: float | None = None
    """c tanh(score / c)."""
    logits_cap: float | None = None


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    model_type: str
    genai_type: str
    """What onnxruntime-genai calls it; `decoder` is its name for any other."""
    names: Names = Names()
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: bool = False
    """Norms multiply by 1 + weight."""
    qk_norm: Literal["head", "all"] | None = None
    """Query and key are normed by head, or over all heads at once."""
    gated: bool = True
    parallel: bool | str = False
    """Attention and MLP read the same residual stream; a text is the config key that says so."""
    qkv_by_head: bool = False
    """Rows of the one qkv matrix come head by head: query, key, value of head 0, then of head 1 ..."""
    qkv_bias: bool | str = False
    """A text is the config key that says so, here and below."""
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    """Our name of a config key -> this family's: norm_eps, hidden_act, rope_theta, partial_rotary_factor."""
    activations: Mapping[str, str] = field(default_factory=dict)
    """Activations that mean another one in this family."""
    partial_rotary: bool = False
    """Whether `partial_rotary_factor` counts in this family."""
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    """Older names of rope kinds in this family."""
    scales: Callable[[Values], Scales] = lambda values: Scales()
    window: Callable[[Values, int], bool] | None = None
    """Whether a layer has the sliding window, where config.json lists no `layer_types`; None: no layer has."""
    layer_types: bool = True
    """Whether `layer_types` counts in this family."""
    rotates: Callable[[Values, int], bool] = lambda values, layer: True
    """Whether a layer rotates queries and keys."""
    local_rope: Callable[[Values], Values] | None = None
    """Rope parameters of the layers with a window, where they have their own."""
    experts: Experts | None = None
    defaults: Values = field(default_factory=dict)
    """Values of keys that `config.json` may leave out because they are the config class's own."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Config keys that must be absent, null or false, and why."""
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Ends of the names of tensors that older checkpoints carry and the config says better."""


def _windows_if_used(values: Values, layer: int) -> bool:
    return bool(values.get("use_sliding_window")) and layer >= int(values.get("max_window_layers", 0))


def _gemma_scales(values: Values) -> Scales:
    head_dim = values.get("query_pre_attn_scalar")
    return Scales(
        embedding=float(values["hidden_size"]) ** 0.5,
        in_embedding=True,
        attention=None if head_dim is None else float(head_dim) ** -0.5,
        attention_cap=values.get("attn_logit_softcapping"),
        logits_cap=values.get("final_logit_softcapping"),
    )


def _granite_scales(values: Values) -> Scales:
    return Scales(
        embedding=float(values["embedding_multiplier"]),
        attention=float(values["attention_multiplier"]),
        residual=float(values["residual_multiplier"]),
        logits=1.0 / float(values["logits_scaling"]),
    )


def _smollm3_rotates(values: Values, layer: int) -> bool:
    listed = values.get("no_rope_layers")  # 1 where a layer does rotate
    return bool(listed[layer]) if listed else (layer + 1) % int(values["no_rope_layer_interval"]) != 0


def _qwen_has_experts(values: Values, layer: int) -> bool:
    dense = values.get("mlp_only_layers") or ()
    return layer not in dense and (layer + 1) % int(values["decoder_sparse_step"]) == 0


_LLAMA_DEFAULTS: Values = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu"}
_MISTRAL_DEFAULTS: Values = {
    **_LLAMA_DEFAULTS, "max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8
}  # fmt: skip
_QWEN_DEFAULTS: Values = {
    **_LLAMA_DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096,
    "max_window_layers": 28, "use_sliding_window": False,
}  # fmt: skip
_GEMMA_DEFAULTS: Values = {
    **_LLAMA_DEFAULTS, "max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096,
}  # fmt: skip
_GPT_OSS_ROPE: Values = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_SANDWICH = Names(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
_QK_NORM = Names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
_OLMO_NAMES = Names(
    attention_norm=None,
    attention_out_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_out_norm="post_feedforward_layernorm",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)

FAMILIES: Mapping[str, Family] = MappingProxyType({
    row.model_type: row
    for row in (
        Family("llama", "llama", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias",
               defaults=_LLAMA_DEFAULTS),
        Family("mistral", "mistral", window=lambda values, layer: True, layer_types=False, defaults=_MISTRAL_DEFAULTS),
        Family("ministral", "mistral", window=lambda values, layer: True, defaults=_MISTRAL_DEFAULTS),
        Family(
            "phi3",
            "phi3",
            Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
            window=lambda values, layer: True,
            layer_types=False,
            rope_aliases={"su": "longrope", "yarn": "longrope"},
            partial_rotary=True,
            defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
                      "original_max_position_embeddings": 4096, "hidden_act": "silu"},
        ),
        Family("qwen2", "qwen2", qkv_bias=True, window=_windows_if_used, defaults=_QWEN_DEFAULTS),
        Family(
            "qwen3",
            "qwen3",
            _QK_NORM,
            qk_norm="head",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            window=_windows_if_used,
            defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        ),
        Family(
            "gemma",
            "gemma",
            norm_offset=True,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            activations={"gelu": "gelu_pytorch_tanh"},  # an older config says gelu and means its approximation
            scales=lambda values: Scales(embedding=float(values["hidden_size"]) ** 0.5, in_embedding=True),
            defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 16},
        ),
        Family(
            "gemma2",
            "gemma2",
            _SANDWICH,
            norm_offset=True,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            keys={"hidden_act": "hidden_activation"},
            scales=_gemma_scales,
            window=lambda values, layer: layer % 2 == 0,
            defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
                      "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            refused={"use_bidirectional_attention": "the graph is causal"},
        ),
        Family(
            "gemma3_text",
            "gemma3_text",
            replace(_SANDWICH, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
            norm_offset=True,
            qk_norm="head",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            keys={"hidden_act": "hidden_activation"},
            scales=lambda values: replace(_gemma_scales(values), attention_cap=None),
            window=lambda values, layer: (layer + 1) % int(values.get("sliding_window_pattern", 6)) != 0,
            local_rope=lambda values: {"rope_theta": values.get("rope_local_base_freq", 10000.0)},
            defaults={**_GEMMA_DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 4,
                      "query_pre_attn_scalar": 256, "rope_theta": 1000000.0},
            refused={"use_bidirectional_attention": "the graph is causal"},
        ),
        Family(
            "smollm3",
            "smollm3",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            window=lambda values, layer: (
                bool(values.get("use_sliding_window")) and not _smollm3_rotates(values, layer)
            ),
            rotates=_smollm3_rotates,
            defaults={**_LLAMA_DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 4,
                      "rope_theta": 2000000.0, "no_rope_layer_interval": 4, "tie_word_embeddings": True},
        ),
        Family(
            "olmo2",
            "olmo",
            _OLMO_NAMES,
            qk_norm="all",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            defaults={**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5},
        ),
        Family(
            "olmo3",
            "olmo",
            _OLMO_NAMES,
            qk_norm="all",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            window=lambda values, layer: (layer + 1) % 4 != 0,
            local_rope=lambda values: {"rope_theta": values.get("rope_theta", 500000.0)},
            defaults={**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096},
        ),
        Family(
            "granite",
            "granite",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            scales=_granite_scales,
            defaults={**_LLAMA_DEFAULTS, "embedding_multiplier": 1.0, "attention_multiplier": 1.0,
                      "residual_multiplier": 1.0, "logits_scaling": 1.0},
        ),
        Family(
            "starcoder2",
            "decoder",
            Names(gate_up=("mlp.c_fc",), down="mlp.c_proj"),
            norm="layer",
            gated=False,
            qkv_bias="use_bias",
            o_bias="use_bias",
            mlp_bias="use_bias",
            keys={"norm_eps": "norm_epsilon"},
            window=lambda values, layer: True,
            layer_types=False,
            defaults={"norm_epsilon": 1e-5, "max_position_embeddings": 4096, "hidden_act": "gelu_pytorch_tanh",
                      "num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True},
        ),
        Family(
            "stablelm",
            "decoder",
            norm="layer",
            qkv_bias="use_qkv_bias",
            keys={"norm_eps": "layer_norm_eps"},
            partial_rotary=True,
            defaults={"layer_norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "silu",
                      "partial_rotary_factor": 0.25},
            refused={"qk_layernorm": "its norms have a weight for each head",
                     "use_parallel_residual": "its attention and MLP then share one norm, and the row names two"},
        ),
        Family(
            "phi",
            "phi",
            Names(final_norm="model.final_layernorm", o="self_attn.dense", gate_up=("mlp.fc1",), down="mlp.fc2",
                  mlp_norm=None),
            norm="layer",
            gated=False,
            parallel=True,
            qkv_bias=True,
            o_bias=True,
            mlp_bias=True,
            head_bias=True,
            keys={"norm_eps": "layer_norm_eps"},
            partial_rotary=True,
            defaults={"layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_act": "gelu_new",
                      "partial_rotary_factor": 0.5},
            refused={"qk_layernorm": "no released model has it"},
        ),
        Family(
            "gpt_neox",
            "decoder",
            Names("gpt_neox.embed_in", "gpt_neox.layers.{}", "gpt_neox.final_layer_norm", "embed_out",
                  ("attention.query_key_value",), "attention.dense", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
            norm="layer",
            gated=False,
            parallel="use_parallel_residual",
            qkv_by_head=True,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias=True,
            keys={"norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
            ignored=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
            partial_rotary=True,
            defaults={"layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_act": "gelu", "rotary_pct": 0.25,
                      "use_parallel_residual": True, "attention_bias": True},
        ),
        Family(
            "qwen3_moe",
            "qwen3",
            _QK_NORM,
            qk_norm="head",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            window=lambda values, layer: bool(values.get("use_sliding_window")),
            layer_types=False,
            experts=Experts("mlp.gate", ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
                            "mlp.experts.{}.down_proj", inner="moe_intermediate_size", normalized="norm_topk_prob",
                            layers=_qwen_has_experts),
            defaults={**_QWEN_DEFAULTS, "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128,
                      "num_experts_per_tok": 8, "decoder_sparse_step": 1},
        ),
        Family(
            "mixtral",
            "mistral",
            window=lambda values, layer: True,
            layer_types=False,
            experts=Experts("block_sparse_moe.gate",
                            ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
                            "block_sparse_moe.experts.{}.w2"),
            defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "hidden_act": "silu",
                      "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
                      "rope_theta": 1000000.0},
        ),
        Family(
            "gpt_oss",
            "gptoss",
            Names(sinks="self_attn.sinks"),
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            window=lambda values, layer: layer % 2 == 0,
            experts=Experts("mlp.router", ("mlp.experts.gate_up_proj",), "mlp.experts.down_proj", bias=True,
                            clamped=True),
            defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "hidden_act": "silu", "head_dim": 64,
                      "num_key_value_heads": 8, "num_local_experts": 128, "num_experts_per_tok": 4,
                      "sliding_window": 128, "attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
                      "rope_theta": 150000.0, "rope_scaling": _GPT_OSS_ROPE},
        ),
    )
})  # fmt: skip
