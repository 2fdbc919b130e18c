"""What the builder must know of a decoder: sizes, weight names, rope, biases. Architectures are rows of a table.

A new dense family whose block is `x + attention(norm(x))`, `x + mlp(norm(x))` with RMSNorm and a gated MLP is one row
of `FAMILIES` and one parity test.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from coldpress.errors import CheckpointError, UnsupportedModelError

__all__ = ["FAMILIES", "Arch", "Family", "Linear", "Rope", "Rows", "arch_from_config"]


@dataclass(frozen=True)
class Family:
    """A row of the table. Weight names are relative to their layer."""

    model_type: str
    genai_type: str
    """What onnxruntime-genai calls it."""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three names, or one when the checkpoint keeps query, key and value rows in one matrix, in that order."""
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Two names, or one when gate rows and up rows are one matrix, in that order."""
    o: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    input_norm: str = "input_layernorm"
    post_norm: str = "post_attention_layernorm"
    bias_keys: tuple[str, str] | None = None
    """Config keys that say whether attention and MLP have biases; None: they never do."""
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    """Older names of rope kinds in this family."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that `config.json` may leave out because they are the config class's own."""


_LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu"}

FAMILIES: Mapping[str, Family] = MappingProxyType({
    row.model_type: row
    for row in (
        Family("llama", "llama", bias_keys=("attention_bias", "mlp_bias"), defaults=_LLAMA_DEFAULTS),
        Family(
            "mistral",
            "mistral",
            defaults={**_LLAMA_DEFAULTS, "max_position_embeddings": 131072, "sliding_window": 4096,
                      "num_key_value_heads": 8},
        ),
        Family(
            "phi3",
            "phi3",
            qkv=("self_attn.qkv_proj",),
            gate_up=("mlp.gate_up_proj",),
            rope_aliases={"su": "longrope", "yarn": "longrope"},
            defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
                      "original_max_position_embeddings": 4096, "hidden_act": "silu"},
        ),
    )
})  # fmt: skip

ACTIVATIONS = ("silu", "swish")

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
)
_NUMBERS = ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")

_PLACE = "config.json of the model"
_HINT = "is the download complete? Otherwise correct the key in config.json"


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a model; `parameters` are those of `kernels.rope`."""

    kind: str
    dim: int
    """Rotary dimensions of a head."""
    theta: float
    parameters: Mapping[str, Any] = field(default_factory=dict)
    short_factors: tuple[float, ...] = ()
    """longrope: used up to `original_length` tokens, `long_factors` beyond."""
    long_factors: tuple[float, ...] = ()
    original_length: int = 0


@dataclass(frozen=True)
class Rows:
    """Rows `first` to `first + count` of a checkpoint tensor."""

    tensor: str
    first: int
    count: int


@dataclass(frozen=True)
class Linear:
    """A matrix product of the graph: y = x W^T + b, W stacked from `parts`."""

    parts: tuple[Rows, ...]
    n: int
    """Rows of W: features out."""
    k: int
    """Columns of W: features in."""
    bias: bool


@dataclass(frozen=True)
class Arch:
    """A decoder, as its config.json describes it."""

    family: Family
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    tied: bool
    """Whether the head reads the embedding matrix."""
    context_length: int
    rope: Rope
    sliding_window: int | None
    attention_bias: bool
    mlp_bias: bool

    @property
    def embedding(self) -> str:
        return "model.embed_tokens.weight"

    @property
    def final_norm(self) -> str:
        return "model.norm.weight"

    def norm(self, layer: int, name: str) -> str:
        return f"model.layers.{layer}.{name}.weight"

    def qkv(self, layer: int) -> Linear:
        """Query, key and value in one product, in that order of rows."""
        counts = (self.heads * self.head_dim, *2 * (self.kv_heads * self.head_dim,))
        return self._linear(layer, self.family.qkv, counts, self.hidden, self.attention_bias)

    def o(self, layer: int) -> Linear:
        return self._linear(layer, (self.family.o,), (self.hidden,), self.heads * self.head_dim, self.attention_bias)

    def gate(self, layer: int) -> Linear:
        return self._half_of_gate_up(layer, 0)

    def up(self, layer: int) -> Linear:
        return self._half_of_gate_up(layer, 1)

    def down(self, layer: int) -> Linear:
        return self._linear(layer, (self.family.down,), (self.hidden,), self.intermediate, self.mlp_bias)

    def head(self) -> Linear:
        name = self.embedding if self.tied else "lm_head.weight"
        return Linear((Rows(name, 0, self.vocab),), self.vocab, self.hidden, bias=False)

    def _half_of_gate_up(self, layer: int, half: int) -> Linear:
        names, rows = self.family.gate_up, self.intermediate
        if len(names) == 2:
            return self._linear(layer, (names[half],), (rows,), self.hidden, self.mlp_bias)
        part = Rows(f"model.layers.{layer}.{names[0]}.weight", half * rows, rows)
        return Linear((part,), rows, self.hidden, self.mlp_bias)

    def _linear(self, layer: int, names: tuple[str, ...], counts: tuple[int, ...], k: int, bias: bool) -> Linear:
        if len(names) == 1:
            counts = (sum(counts),)
        parts = tuple(
            Rows(f"model.layers.{layer}.{name}.weight", 0, count) for name, count in zip(names, counts, strict=True)
        )
        return Linear(parts, sum(counts), k, bias)

    def linears(self, layer: int) -> tuple[Linear, ...]:
        return (self.qkv(layer), self.o(layer), self.gate(layer), self.up(layer), self.down(layer))

    def expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every checkpoint tensor that the graph reads."""
        yield self.embedding, (self.vocab, self.hidden)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)
        yield self.final_norm, (self.hidden,)
        for layer in range(self.layers):
            yield self.norm(layer, self.family.input_norm), (self.hidden,)
            yield self.norm(layer, self.family.post_norm), (self.hidden,)
            rows: dict[str, tuple[int, int, bool]] = {}
            for linear in self.linears(layer):
                for part in linear.parts:
                    end = max(part.first + part.count, rows.get(part.tensor, (0, 0, False))[0])
                    rows[part.tensor] = (end, linear.k, linear.bias)
            for name, (n, k, bias) in rows.items():
                yield name, (n, k)
                if bias:
                    yield name.removesuffix("weight") + "bias", (n,)


def arch_from_config(config: Mapping[str, Any]) -> Arch:
    """The decoder that a Hugging Face `config.json` describes.

    Reads today's `rope_parameters` and the older `rope_theta` + `rope_scaling`. Raises UnsupportedModelError for a
    family, activation or rope kind without a row, CheckpointError for a config that contradicts itself.
    """
    family = _family(config)
    values = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    # A null means "no window" and must not be filled with the default.
    window = config["sliding_window"] if "sliding_window" in config else family.defaults.get("sliding_window")
    _check_values(family, config, values)
    hidden, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
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
    if values["hidden_act"] not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{family.model_type} with hidden_act {values['hidden_act']!r}; the builder has: {', '.join(ACTIVATIONS)}"
        )
    head_dim = int(values.get("head_dim", hidden // heads))
    attention_bias, mlp_bias = (bool(values.get(key)) for key in family.bias_keys or ("", ""))
    return Arch(
        family=family,
        hidden=hidden,
        intermediate=int(values["intermediate_size"]),
        layers=int(values["num_hidden_layers"]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=int(values["vocab_size"]),
        norm_eps=float(values["rms_norm_eps"]),
        tied=bool(values.get("tie_word_embeddings", False)),
        context_length=int(values["max_position_embeddings"]),
        rope=_rope(family, values, head_dim),
        sliding_window=None if window is None else int(window),
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
    )


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
        hint="a decoder with the same block and other names is one row of FAMILIES in coldpress/artifacts/arch.py",
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
        for key in _NUMBERS
        if key in values and not (_is_number(values[key]) and values[key] > 0)
    ]
    problems += [
        f"{key} is {values[key]!r}, must be true or false"
        for key in _FLAGS
        if key in values and not isinstance(values[key], bool)
    ]
    problems += [
        f"{key} is {values[key]!r}, must be a mapping"
        for key in ("rope_scaling", "rope_parameters")
        if key in values and not isinstance(values[key], Mapping)
    ]
    if problems:
        raise CheckpointError(f"{_PLACE} (model_type {family.model_type}): " + "; ".join(problems), hint=_HINT)


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
            if not isinstance(value, list) or not all(map(_is_number, value)):
                problems.append(f"{key} must be a list of numbers, got {str(value)[:60]}")
        elif not _is_number(value):
            problems.append(f"{key} is {value!r}, must be a number")
    if problems:
        raise CheckpointError(f"{_PLACE}, rope type {kind!r}: " + "; ".join(problems), hint=_HINT)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rope(family: Family, values: Mapping[str, Any], head_dim: int) -> Rope:
    raw = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
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
    partial = float(raw.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)))
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
    theta = float(raw.get("rope_theta", values.get("rope_theta", 10000.0)))
    if dim < 2 or dim % 2 or not math.isfinite(theta):
        raise CheckpointError(
            f"{_PLACE}: {dim} rotary dimensions of head size {head_dim}, rope_theta {theta}; "
            "the dimensions must be even and at least 2, rope_theta finite",
            hint=_HINT,
        )
    return Rope(kind, dim, theta, parameters, short, long, original)
