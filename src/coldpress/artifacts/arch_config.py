"""config.json to Arch: values of any age and family, checked, and refused with every reason at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from coldpress.artifacts.arch import Arch, Mixture, Rope
from coldpress.artifacts.families import FAMILIES, Family
from coldpress.errors import CheckpointError, UnsupportedModelError

__all__ = ["arch_from_config"]

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Names in configs -> what the graph has. The three approximations by tanh differ in the last bits only."""

# kind -> (keys it must have, keys it may have); names as in Hugging Face configs
_ROPE_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor",), ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
    ),
    "longrope": (("short_factor", "long_factor"), ("attention_factor", "factor")),
}  # fmt: skip
_HAS_ORIGINAL_LENGTH = ("llama3", "yarn", "longrope")

_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_SIZES = (
    *_REQUIRED,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
    "sliding_window_pattern",
    "no_rope_layer_interval",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
)
_NUMBERS = (
    "norm_eps", "rope_theta", "partial_rotary_factor", "rope_local_base_freq", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping", "embedding_multiplier", "attention_multiplier",
    "residual_multiplier", "logits_scaling", "swiglu_alpha", "swiglu_limit",
)  # fmt: skip
_LISTS: Mapping[str, tuple[Any, ...]] = {
    "layer_types": ("full_attention", "sliding_attention"),
    "no_rope_layers": (0, 1),
}
"""Lists with one entry a layer, and what an entry may be."""

_NULL_MEANS_NONE = (
    "sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads", "head_dim"
)  # fmt: skip
"""Keys whose null says something: no window, no cap, as many as there are heads ..."""
MOST_LAYERS = 10_000

_PLACE = "config.json of the model"
_HINT = "is the download complete? Otherwise correct the key in config.json"


def arch_from_config(config: Mapping[str, Any]) -> Arch:
    """The decoder that a Hugging Face `config.json` describes.

    Reads today's `rope_parameters` and the older `rope_theta` + `rope_scaling`. Raises UnsupportedModelError for a
    family, activation or rope kind without a row, CheckpointError for a config that contradicts itself.
    """
    family = _family(config)
    values = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    for key in _NULL_MEANS_NONE:
        if key in config and config[key] is None:
            values.pop(key, None)  # must not be filled with the default
    if config.get("rope_parameters") and not config.get("rope_scaling"):
        values.pop("rope_scaling", None)  # the default is for a config that says nothing of its rope
    _check_values(family, config, values)
    hidden, heads, layers = (int(values[key]) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads = int(values.get("num_key_value_heads", heads))
    if "head_dim" not in values and hidden % heads:
        raise CheckpointError(
            f"{_PLACE}: hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim is not given",
            hint=_HINT,
        )
    if heads % kv_heads:
        raise CheckpointError(
            f"{_PLACE}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}", hint=_HINT
        )
    head_dim = int(values.get("head_dim", hidden // heads))
    if family.qkv_by_head and kv_heads != heads:
        raise UnsupportedModelError(f"{family.model_type} with num_key_value_heads {kv_heads}: it has {heads} of each")
    slides = tuple(_slides(family, values, layer) for layer in range(layers))
    size = values.get("sliding_window")

    def flag(value: bool | str) -> bool:
        return bool(values.get(value)) if isinstance(value, str) else value

    return Arch(
        family=family,
        hidden=hidden,
        intermediate=int(values["intermediate_size"]),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=int(values["vocab_size"]),
        norm_eps=float(_value(family, values, "norm_eps")),
        tied=bool(values.get("tie_word_embeddings", False)),
        context_length=int(values["max_position_embeddings"]),
        activation=_activation(family, values),
        parallel=flag(family.parallel),
        qkv_bias=flag(family.qkv_bias),
        o_bias=flag(family.o_bias),
        mlp_bias=flag(family.mlp_bias),
        scales=family.scales(values),
        windows=tuple(int(size) if size is not None and sliding else None for sliding in slides),
        ropes=_ropes(family, values, head_dim, slides),
        mixture=_mixture(family, config, values),
    )


def _mixture(family: Family, config: Mapping[str, Any], values: Mapping[str, Any]) -> Mixture | None:
    names = family.experts
    if names is None:
        return None
    # The key that config.json has counts, not the other one's default; "num_experts" is the older of the two.
    key = next((key for key in ("num_local_experts", "num_experts") if config.get(key) is not None), None)
    experts = int(values[key or next(key for key in ("num_local_experts", "num_experts") if key in values)])
    top_k = int(values["num_experts_per_tok"])
    if top_k > experts:
        raise CheckpointError(f"{_PLACE}: num_experts_per_tok {top_k} of {experts} experts", hint=_HINT)
    if _activation(family, values) != "silu":
        raise UnsupportedModelError(
            f"{family.model_type} with {_key(family, 'hidden_act')} {values[_key(family, 'hidden_act')]!r}: the kernel "
            "of experts has a gate with silu only"
        )
    listed = values.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise CheckpointError(f"{_PLACE}: mlp_only_layers is {listed!r}, must be a list of layer numbers", hint=_HINT)
    layers = tuple(names.layers(values, layer) for layer in range(int(values["num_hidden_layers"])))
    normalized = bool(values.get(names.normalized)) if isinstance(names.normalized, str) else names.normalized
    clamp = (float(values["swiglu_alpha"]), 1.0, float(values["swiglu_limit"])) if names.clamped else (1.0, 0.0, None)
    return Mixture(experts, top_k, int(values[names.inner]), normalized, layers, *clamp)


def _key(family: Family, name: str) -> str:
    return family.keys.get(name, {"norm_eps": "rms_norm_eps"}.get(name, name))


def _value(family: Family, values: Mapping[str, Any], name: str, default: Any = None) -> Any:
    return values.get(_key(family, name), default)


def _activation(family: Family, values: Mapping[str, Any]) -> str:
    key = _key(family, "hidden_act")
    name = values.get(key)
    name = family.activations.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{family.model_type} with {key} {name!r}; the builder has: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _slides(family: Family, values: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer is one of those with a window, be its size set or not."""
    if family.window is None:
        return False
    if family.layer_types and "layer_types" in values and values.get("use_sliding_window", True):
        return bool(values["layer_types"][layer] == "sliding_attention")
    return family.window(values, layer)


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(sorted(FAMILIES))
    if not isinstance(model_type, str):
        raise UnsupportedModelError(f"config.json has no model_type; the builder has: {known}")
    near = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.0)[0]
    raise UnsupportedModelError(
        f"the builder has no row for model_type {model_type!r}; it has: {known} (the nearest: {near})",
        hint="a dense decoder with other names is one row of FAMILIES in coldpress/artifacts/families.py",
    )


def _check_values(family: Family, config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Every size must be a whole number above 0, every number and flag one; raises CheckpointError with all others."""
    problems = [
        f"{key} is {'null' if key in config else 'missing'}, must be a whole number above 0"
        for key in _REQUIRED
        if key not in values
    ]
    problems += [
        f"{key} is {values[key]!r}, must be a whole number above 0"
        for key in _SIZES
        if key in values and not (type(values[key]) is int and values[key] > 0)
    ]
    problems += [
        f"{key} is {values[key]!r}, must be a number above 0"
        for key in dict.fromkeys(_key(family, name) for name in _NUMBERS)
        if key in values and not (_is_number(values[key]) and values[key] > 0)
    ]
    if type(values.get("num_hidden_layers")) is int and values["num_hidden_layers"] > MOST_LAYERS:
        problems.append(f"num_hidden_layers is {values['num_hidden_layers']}, must be at most {MOST_LAYERS}")
    normalized = family.experts.normalized if family.experts is not None else False
    flags = [
        key
        for key in (family.parallel, family.qkv_bias, family.o_bias, family.mlp_bias, normalized)
        if isinstance(key, str)
    ]
    problems += [
        f"{key} is {values[key]!r}, must be true or false"
        for key in dict.fromkeys(("tie_word_embeddings", "use_sliding_window", *flags))
        if key in values and not isinstance(values[key], bool)
    ]
    problems += [
        f"{key} is {values[key]!r}, must be a mapping"
        for key in ("rope_scaling", "rope_parameters")
        if key in values and not isinstance(values[key], Mapping)
    ]
    layers = values.get("num_hidden_layers")
    for key, allowed in _LISTS.items():
        listed = values.get(key)
        if key not in values or (key == "layer_types" and not family.layer_types):
            continue
        if not isinstance(listed, list) or (type(layers) is int and len(listed) < layers):
            problems.append(f"{key} must be a list with an entry for each of the {layers} layers")
        elif any(entry not in allowed for entry in listed):
            odd = next(entry for entry in listed if entry not in allowed)
            problems.append(f"{key} has {odd!r}; the builder has: {', '.join(map(str, allowed))}")
    if problems:
        raise CheckpointError(f"{_PLACE} (model_type {family.model_type}): " + "; ".join(problems), hint=_HINT)
    for key, why in family.refused.items():
        if values.get(key):
            raise UnsupportedModelError(f"{family.model_type} with {key} {values[key]!r} cannot be built: {why}")


def _check_rope_values(kind: str, raw: Mapping[str, Any]) -> None:
    """Numbers, and lists of numbers, in a mapping of rope parameters; raises CheckpointError with every other value."""
    required, optional = _ROPE_KEYS[kind]
    keys = (*required, *optional, "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    problems = []
    for key in keys:
        value = raw.get(key)
        if value is None or key == "truncate":
            continue
        if key.endswith("_factor") and key.startswith(("short", "long")):
            if not isinstance(value, list) or not all(_is_number(each) and each > 0 for each in value):
                problems.append(f"{key} must be a list of numbers above 0, got {str(value)[:60]}")
        elif not _is_number(value) or (value <= 0 and not key.startswith("mscale")):
            problems.append(f"{key} is {value!r}, must be a number above 0")
    if problems:
        raise CheckpointError(f"{_PLACE}, rope type {kind!r}: " + "; ".join(problems), hint=_HINT)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ropes(
    family: Family, values: Mapping[str, Any], head_dim: int, slides: tuple[bool, ...]
) -> tuple[Rope | None, ...]:
    """Of each layer. Some families have two: one for layers with a window, one for those that see everything."""
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    nested = {key: new[key] for key in _LISTS["layer_types"] if isinstance(new.get(key), Mapping)}
    # An older key beside the new one is what the user added last, and Transformers lets it win.
    whole = {**nested["full_attention"], **old} if "full_attention" in nested else old or new
    everywhere = _rope(family, values, head_dim, whole)
    local = everywhere
    if family.local_rope is not None:
        local = _rope(family, values, head_dim, nested.get("sliding_attention") or family.local_rope(values))
    return tuple(
        (local if sliding else everywhere) if family.rotates(values, layer) else None
        for layer, sliding in enumerate(slides)
    )


def _rope(family: Family, values: Mapping[str, Any], head_dim: int, raw: Mapping[str, Any]) -> Rope:
    raw = {key: value for key, value in raw.items() if value is not None}
    kind = str(raw.get("rope_type") or raw.get("type") or "default")
    kind = family.rope_aliases.get(kind, kind)
    if kind not in _ROPE_KEYS:
        raise UnsupportedModelError(
            f"{family.model_type} with rope type {kind!r}; the builder has: {', '.join(_ROPE_KEYS)}"
        )
    required, optional = _ROPE_KEYS[kind]
    missing = [key for key in required if raw.get(key) is None]
    if missing:
        raise CheckpointError(f"{_PLACE}: rope type {kind!r} needs {', '.join(missing)}", hint=_HINT)
    _check_rope_values(kind, raw)
    partial = float(raw.get("partial_rotary_factor", _value(family, values, "partial_rotary_factor", 1.0)))
    if partial != 1.0 and not family.partial_rotary:
        raise UnsupportedModelError(
            f"{family.model_type} with partial_rotary_factor {partial:g}: Transformers does not read it in this family",
            hint="remove the key from config.json if the model rotates whole heads",
        )
    dim = int(head_dim * partial)
    length = int(values["max_position_embeddings"])
    # Phi-3 keeps the original length beside the rope parameters, and there it wins (as in Transformers).
    original = int(
        values.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings") or length
    )
    parameters: dict[str, Any] = {key: raw[key] for key in (*required, *optional) if raw.get(key) is not None}
    short, long = (tuple(map(float, parameters.pop(key, ()))) for key in ("short_factor", "long_factor"))
    if kind == "longrope":
        parameters.setdefault("factor", length / original)
        if not len(short) == len(long) == dim // 2:
            raise CheckpointError(
                f"{_PLACE}: longrope wants {dim // 2} factors for {dim} rotary dimensions, "
                f"got {len(short)} short and {len(long)} long",
                hint=_HINT,
            )
    if kind in _HAS_ORIGINAL_LENGTH:
        parameters["original_length"] = original
    theta = float(raw.get("rope_theta", _value(family, values, "rope_theta", 10000.0)))
    if dim < 2 or dim % 2 or not (math.isfinite(theta) and theta > 1):
        raise CheckpointError(
            f"{_PLACE}: {dim} rotary dimensions of head size {head_dim}, rope_theta {theta}; "
            "the dimensions must be even and at least 2, rope_theta finite and above 1",
            hint=_HINT,
        )
    return Rope(kind, dim, theta, parameters, short, long, original)
