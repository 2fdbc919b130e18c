"""What the builder must know of a decoder: sizes, weights, rope, windows. `artifacts/arch_config.py` makes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from coldpress.artifacts.families import Experts, Family, Scales

__all__ = ["Arch", "Linear", "Mixture", "Rope", "Rows"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding; `parameters` are those of `kernels.rope`."""

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
    k: int
    """Columns of W: features in."""
    bias: tuple[Rows, ...] = ()
    """b, stacked like W; empty without one."""

    @property
    def n(self) -> int:
        """Rows of W: features out."""
        return sum(part.count for part in self.parts)


@dataclass(frozen=True)
class Mixture:
    """The experts of a decoder; `family.experts` has their names."""

    experts: int
    top_k: int
    """Experts that a token goes through."""
    inner: int
    """Inner size of each."""
    normalized: bool
    """Weights of a token's experts sum to 1; otherwise they are those of a softmax over all experts."""
    layers: tuple[bool, ...]
    """Whether a layer has experts."""
    alpha: float = 1.0
    """An expert is down(G * sigmoid(alpha * G) * (L + beta)), G = min(gate, limit), L = clamp(up, -limit, limit)."""
    beta: float = 0.0
    limit: float | None = None


def _linear(parts: tuple[Rows, ...], k: int, bias: bool) -> Linear:
    """With its bias beside the weights: the same rows."""
    return Linear(parts, k, tuple(Rows(_beside(part.tensor), part.first, part.count) for part in parts if bias))


def _beside(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


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
    activation: str
    """silu, gelu or gelu_tanh."""
    parallel: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    scales: Scales
    windows: tuple[int | None, ...]
    """Of each layer: how many tokens it looks back, itself included; None is all."""
    ropes: tuple[Rope | None, ...]
    """Of each layer; None does not rotate."""
    mixture: Mixture | None = None

    @property
    def rope(self) -> Rope:
        """Of the layers that see everything, or of the first that rotates."""
        found = [(window is not None, layer) for layer, window in enumerate(self.windows) if self.ropes[layer]]
        rope = self.ropes[min(found)[1]] if found else None
        return rope or Rope("default", 2, 10000.0)

    @property
    def rope_kinds(self) -> tuple[Rope, ...]:
        """The different ropes of the layers, in order of their first layer."""
        found: list[Rope] = []
        for rope in self.ropes:
            if rope is not None and rope not in found:
                found.append(rope)
        return tuple(found)

    @property
    def embedding(self) -> str:
        return f"{self.family.names.embedding}.weight"

    @property
    def final_norm(self) -> str:
        return f"{self.family.names.final_norm}.weight"

    def of_layer(self, layer: int, name: str) -> str:
        """Full name of a weight of a layer."""
        return f"{self.family.names.layer.format(layer)}.{name}.weight"

    def q(self, layer: int) -> Linear:
        return self._third(layer, 0)

    def k(self, layer: int) -> Linear:
        return self._third(layer, 1)

    def v(self, layer: int) -> Linear:
        return self._third(layer, 2)

    def qkv(self, layer: int) -> Linear:
        """Query, key and value in one product, in that order of rows."""
        names, counts = self.family.names.qkv, self._qkv_counts
        if len(names) == 1 and not self.family.qkv_by_head:
            part = Rows(self.of_layer(layer, names[0]), 0, sum(counts))
            return _linear((part,), self.hidden, self.qkv_bias)
        parts = (*self.q(layer).parts, *self.k(layer).parts, *self.v(layer).parts)
        return _linear(parts, self.hidden, self.qkv_bias)

    @property
    def _qkv_counts(self) -> tuple[int, int, int]:
        keys = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, keys, keys

    def _third(self, layer: int, which: int) -> Linear:
        names, counts, d = self.family.names.qkv, self._qkv_counts, self.head_dim
        if len(names) == 3:
            parts: tuple[Rows, ...] = (Rows(self.of_layer(layer, names[which]), 0, counts[which]),)
        elif self.family.qkv_by_head:
            tensor = self.of_layer(layer, names[0])
            parts = tuple(Rows(tensor, (3 * head + which) * d, d) for head in range(self.heads))
        else:
            parts = (Rows(self.of_layer(layer, names[0]), sum(counts[:which]), counts[which]),)
        return _linear(parts, self.hidden, self.qkv_bias)

    def o(self, layer: int) -> Linear:
        part = Rows(self.of_layer(layer, self.family.names.o), 0, self.hidden)
        return _linear((part,), self.heads * self.head_dim, self.o_bias)

    def gate(self, layer: int) -> Linear:
        return self._half_of_gate_up(layer, 0)

    def up(self, layer: int) -> Linear:
        return self._half_of_gate_up(layer, 1)

    def gate_up(self, layer: int) -> Linear:
        """Gate and up in one product."""
        names = self.family.names.gate_up
        if len(names) == 1:
            part = Rows(self.of_layer(layer, names[0]), 0, 2 * self.intermediate)
            return _linear((part,), self.hidden, self.mlp_bias)
        return _linear((*self.gate(layer).parts, *self.up(layer).parts), self.hidden, self.mlp_bias)

    def down(self, layer: int) -> Linear:
        part = Rows(self.of_layer(layer, self.family.names.down), 0, self.hidden)
        return _linear((part,), self.intermediate, self.mlp_bias)

    def head(self) -> Linear:
        name = self.embedding if self.tied else f"{self.family.names.head}.weight"
        bias = (Rows(f"{self.family.names.head}.bias", 0, self.vocab),) if self.family.head_bias else ()
        return Linear((Rows(name, 0, self.vocab),), self.hidden, bias)

    def _half_of_gate_up(self, layer: int, half: int) -> Linear:
        names, rows = self.family.names.gate_up, self.intermediate
        if not self.family.gated:
            part = Rows(self.of_layer(layer, names[0]), 0, rows)
        elif len(names) == 2:
            part = Rows(self.of_layer(layer, names[half]), 0, rows)
        else:
            part = Rows(self.of_layer(layer, names[0]), half * rows, rows)
        return _linear((part,), self.hidden, self.mlp_bias)

    def sinks(self, layer: int) -> str:
        return f"{self.family.names.layer.format(layer)}.{self.family.names.sinks}"

    def has_experts(self, layer: int) -> bool:
        return self.mixture is not None and self.mixture.layers[layer]

    @property
    def experts(self) -> tuple[Experts, Mixture]:
        """Names and sizes, of a decoder that has experts."""
        assert self.family.experts is not None
        assert self.mixture is not None
        return self.family.experts, self.mixture

    def router(self, layer: int) -> Linear:
        names, mixture = self.experts
        return _linear((Rows(self.of_layer(layer, names.router), 0, mixture.experts),), self.hidden, names.bias)

    def expert_tensors(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of a layer's experts."""
        names, mixture = self.experts
        prefix, count, inner = self.family.names.layer.format(layer), mixture.experts, mixture.inner
        hidden = self.hidden
        if len(names.gate_up) == 1:
            for name, k, n in ((names.gate_up[0], hidden, 2 * inner), (names.down, inner, hidden)):
                yield f"{prefix}.{name}", (count, k, n)
                if names.bias:
                    yield f"{prefix}.{name}_bias", (count, n)
            return
        for expert in range(count):
            for name in names.gate_up:
                yield f"{prefix}.{name.format(expert)}.weight", (inner, hidden)
            yield f"{prefix}.{names.down.format(expert)}.weight", (hidden, inner)

    def linears(self, layer: int) -> tuple[Linear, ...]:
        if self.has_experts(layer):
            return (self.qkv(layer), self.o(layer), self.router(layer))
        gate_up = (self.gate(layer), self.up(layer)) if self.family.gated else (self.up(layer),)
        return (self.qkv(layer), self.o(layer), *gate_up, self.down(layer))

    def norms(self, layer: int) -> Iterator[tuple[str, int]]:
        """Name and length of every norm weight of a layer."""
        names = self.family.names
        for name in (names.attention_norm, names.attention_out_norm, names.mlp_norm, names.mlp_out_norm):
            if name is not None:
                yield self.of_layer(layer, name), self.hidden
        if names.q_norm is not None and names.k_norm is not None:
            whole = self.family.qk_norm == "all"
            for name, heads in ((names.q_norm, self.heads), (names.k_norm, self.kv_heads)):
                yield self.of_layer(layer, name), self.head_dim * (heads if whole else 1)

    def expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every checkpoint tensor that the graph reads."""
        yield self.embedding, (self.vocab, self.hidden)
        if not self.tied:
            yield f"{self.family.names.head}.weight", (self.vocab, self.hidden)
        for part in self.head().bias:
            yield part.tensor, (part.count,)
        yield from self._norm(self.final_norm, self.hidden)
        for layer in range(self.layers):
            for name, length in self.norms(layer):
                yield from self._norm(name, length)
            if self.family.names.sinks is not None:
                yield self.sinks(layer), (self.heads,)
            if self.has_experts(layer):
                yield from self.expert_tensors(layer)
            rows: dict[str, tuple[int, int, bool]] = {}  # first row behind, columns, bias
            for linear in self.linears(layer):
                for part in linear.parts:
                    end = max(part.first + part.count, rows.get(part.tensor, (0, 0, False))[0])
                    rows[part.tensor] = (end, linear.k, bool(linear.bias))
            for name, (n, k, bias) in rows.items():
                yield name, (n, k)
                if bias:
                    yield _beside(name), (n,)

    def _norm(self, weight: str, length: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield weight, (length,)
        if self.family.norm == "layer":
            yield _beside(weight), (length,)
