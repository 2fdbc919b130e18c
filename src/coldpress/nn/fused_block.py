"""A whole decoder layer on a packed row of records of up to 512 tokens as one step of autograd.

    y = x + o_proj(attention(qkv_proj(norm(x))))          out = y + down_proj(silu(gate) * up of norm(y))

A small model spends more time on starting kernels, on copies from one layout into another and in autograd than on its
products. Here a layer is one autograd function, whose attention takes queries, keys and values out of the row by one
index each (`packed_heads`). After its attention, the last layer goes on with the rows that carry loss alone: nothing
reads what it would compute of the others.

A layer is replaced only if it is built like that and agrees with its own output and gradients on a row of the training
data; a row with a long record, or anything else out of the ordinary, goes to the layer's own code.

    T   tokens      products, in this order: qkv_proj (or q, k, v), o_proj, gate_up_proj (or gate, up), down_proj
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from coldpress.nn import block_math
from coldpress.nn.block_math import Dropout
from coldpress.nn.fused import CASTS_KEPT, EXACT, Norm, Product, agree, is_silu, norm_of, product_of
from coldpress.nn.packed_attention import PackedAttention
from coldpress.nn.packed_heads import Attended, Heads, Places, attend, attend_backward, places_of

__all__ = ["fused_blocks"]

LONGEST = 512
"""Tokens of a record up to which its attention is plain products, with all L^2 shares of a head at hand."""
AGREES = 4e-2
"""As `fused.ROUNDED`, for a whole layer in 16 bits: the gradients of queries and keys are differences of nearly equal
numbers, each rounded."""
LEFT_KEPT = 1 << 18
"""Numbers of m * x that are kept for the way back; more are computed again."""


@dataclass(frozen=True)
class _Block:
    """The parts of a decoder layer."""

    qkv: tuple[Product, ...]
    out: Product
    gate_up: tuple[Product, ...]
    down: Product
    norms: tuple[Norm, Norm]
    heads: Heads
    window: int | None
    last: bool

    @property
    def products(self) -> tuple[Product, ...]:
        return (*self.qkv, self.out, *self.gate_up, self.down)

    @property
    def dtype(self) -> torch.dtype:
        return self.out.dtype


@dataclass
class _Tape:
    """What products keep on the way forward; the way back reads it from its end."""

    factors: list[torch.Tensor | None]
    """A and B of each product, in order."""
    dropouts: list[Dropout | None]
    """Of each product."""
    kept: list[torch.Tensor | None] = field(default_factory=list)
    """Of each product A and s B in the type of x (or A and B: `_small`), (m * x) A^T, and m * x where it is small."""
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    """For the factors, from the last one to the first."""
    done: int = 0
    """Products that went forward, less those that came back."""

    def forward(self, products: Sequence[Product], x: torch.Tensor) -> torch.Tensor:
        """Their results side by side."""
        outs = [self._one(product, x) for product in products]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _one(self, product: Product, x: torch.Tensor) -> torch.Tensor:
        """x W^T + bias + s (m * x) A^T B^T."""
        (a, b), dropout = self.factors[2 * self.done : 2 * self.done + 2], self.dropouts[self.done]
        self.done += 1
        weight, bias = product.weight(), product.bias()
        out = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        if a is None or b is None:
            self.kept += [None] * 4
            return out
        own_a, own_b = _factors(product, dropout, a, b, x.dtype)
        left = block_math.dropped(x, dropout)
        inner = torch.mm(left, own_a.t())
        self.kept += [*((own_a, own_b) if _small(a, b) else (a, b)), inner, left if left.numel() <= LEFT_KEPT else None]
        return out.addmm_(inner, own_b.t())

    def backward(
        self, products: Sequence[Product], upstream: torch.Tensor, x: torch.Tensor, *, wanted: bool = True
    ) -> torch.Tensor | None:
        """Gradient for x, unless it is not wanted; those for the factors are kept."""
        for_x: torch.Tensor | None = None
        parts: Sequence[torch.Tensor] = (upstream,)
        if len(products) > 1:
            parts = upstream.split([one.base.out_features for one in products], dim=1)
        for product, part in zip(reversed(products), reversed(parts), strict=True):
            self.done -= 1
            dropout, (a, b, inner, left) = self.dropouts[self.done], self.kept[-4:]
            del self.kept[-4:]
            if wanted:
                weight = product.weight()
                for_x = torch.mm(part, weight) if for_x is None else for_x.addmm_(part, weight)
            if a is None or b is None or inner is None:
                self.gradients += [None, None]
                continue
            own_a, own_b = (a, b) if _small(a, b) else _factors(product, dropout, a, b, x.dtype)
            for_inner = torch.mm(part, own_b)
            self.gradients.append(block_math.widened(torch.mm(part.t(), inner), _scale(product, dropout)))
            left = block_math.dropped(x, dropout) if left is None else left
            self.gradients.append(block_math.widened(torch.mm(for_inner.t(), left), 1.0))
            if for_x is not None and dropout is not None:
                block_math.add_dropped(for_x, torch.mm(for_inner, own_a), dropout)
            elif for_x is not None:
                for_x.addmm_(for_inner, own_a)
        return for_x


def _factors(
    product: Product, dropout: Dropout | None, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and s B in the type of the products."""
    return block_math.narrowed(a, 1.0, dtype), block_math.narrowed(b, _scale(product, dropout), dtype)


def _small(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether what `_factors` makes is kept for the way back; else it is made again."""
    count: int = a.numel() + b.numel()
    return count <= CASTS_KEPT


def _scale(product: Product, dropout: Dropout | None) -> float:
    """Of the adapter; what a dropout lets through stands for what it does not."""
    return product.scale if dropout is None else product.scale / (1 - dropout.probability)


def _dropouts(block: _Block) -> list[Dropout | None]:
    """Of this pass through the layer, one for each product."""
    chances = [one.dropped if one.a is not None and one.module.training else 0.0 for one in block.products]
    if not any(chances):
        return [None] * len(chances)
    seeds = block_math.draw_seeds(len(chances))
    return [Dropout(own, chance) if chance else None for own, chance in zip(seeds, chances, strict=True)]


class _Layer(torch.autograd.Function):  # type: ignore[misc]
    """[1, T, d] -> [1, T, d], or [1, rows, d] where `rows` says so. `factors`: A and B of each product, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        block: _Block,
        places: Places,
        rows: torch.Tensor | None,
        *factors: torch.Tensor | None,
    ) -> torch.Tensor:
        tape, (first, second), entered = _Tape(list(factors), _dropouts(block)), block.norms, x[0].contiguous()
        normed, inverse = block_math.norm(entered, first.weight, first.eps)
        seen, attended = attend(tape.forward(block.qkv, normed), places, block.heads)
        carried = entered
        if rows is not None:
            seen, carried = seen.index_select(0, rows), entered.index_select(0, rows)
        middle = tape.forward((block.out,), seen).add_(carried)
        normed_middle, inverse_middle = block_math.norm(middle, second.weight, second.eps)
        both = tape.forward(block.gate_up, normed_middle)
        product = block_math.gate(both)
        out = tape.forward((block.down,), product).add_(middle)
        ctx.block, ctx.places, ctx.dropouts = block, places, tape.dropouts
        states = [one for each in attended for one in each]
        ctx.save_for_backward(
            entered, inverse, normed, seen, rows, middle, inverse_middle, normed_middle, both, product, *states,
            *tape.kept,
        )  # fmt: skip
        return out.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        block, places, saved = ctx.block, ctx.places, ctx.saved_tensors
        entered, inverse, normed, seen, rows, middle, inverse_middle, normed_middle, both, product = saved[:10]
        split = 10 + 4 * len(places.buckets)
        attended: list[Attended] = [tuple(saved[place : place + 4]) for place in range(10, split, 4)]
        tape = _Tape([], ctx.dropouts, list(saved[split:]), done=len(block.products))
        (first, second), gradient = block.norms, upstream[0].contiguous()
        for_product = tape.backward((block.down,), gradient, product)
        assert for_product is not None
        for_normed = tape.backward(block.gate_up, block_math.gate_backward(for_product, both), normed_middle)
        assert for_normed is not None
        # The gradient that came in may be another one's as well.
        carried = block_math.norm_backward(for_normed, middle, second.weight, inverse_middle, gradient.clone())
        for_seen = tape.backward((block.out,), carried, seen)
        assert for_seen is not None
        if rows is not None:
            for_seen, carried = (_spread(one, rows, len(entered)) for one in (for_seen, carried))
        for_states = attend_backward(for_seen, attended, places, block.heads)
        for_entered = tape.backward(block.qkv, for_states, normed, wanted=ctx.needs_input_grad[0])
        if for_entered is not None:
            carried = block_math.norm_backward(for_entered, entered, first.weight, inverse, carried)
        # Autograd turns these into the type of the factors.
        return carried.unsqueeze(0) if for_entered is not None else None, None, None, None, *reversed(tape.gradients)


def _spread(some: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """A matrix of `count` rows that holds these at `rows`, and 0 elsewhere."""
    return some.new_zeros((count, some.shape[1])).index_copy_(0, rows, some)


# -- in the place of what ----------------------------------------------------------------------------------------------

PASSED = {"attention_mask", "cache_position", "past_key_values", "position_embeddings", "position_ids", "use_cache"}
"""What a decoder hands to its layers; of these, positions alone may hold something here."""


@dataclass
class _Shared:
    """What the layers of a model have in common while it runs."""

    function: PackedAttention
    trimmed: bool = True
    """Whether the last layer leaves rows out."""
    _made_for: tuple[Any, ...] = ()
    _places: Places | None = None

    def places(self, cos: torch.Tensor, sin: torch.Tensor) -> Places:
        segments, before = self.function.segments, self._made_for
        assert segments is not None
        if self._places is None or before[0] is not segments or before[1] is not cos:
            self._made_for, self._places = (segments, cos), places_of(segments, cos, sin)
        return self._places

    def fits(self, block: _Block, x: torch.Tensor, given: Mapping[str, Any]) -> bool:
        """Whether the layer is called in the way that is replaced."""
        segments, angles = self.function.segments, given.get("position_embeddings")
        if segments is None or angles is None or x.dtype != block.dtype or angles[0].dtype != x.dtype:
            return False
        longest = segments.buckets[0].length
        if longest > LONGEST or (block.window is not None and longest > block.window):
            return False
        kept = bool(given.get("use_cache")) or any(
            given.get(name) is not None for name in ("attention_mask", "past_key_values")
        )
        cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != x.dtype
        whole = angles[0].shape[-1] == block.heads.size and len(angles[0]) == len(x) == 1
        others = any(value is not None and name not in PASSED for name, value in given.items())
        return whole and not (kept or cast or others) and all(one.usable for one in block.products)


def _forward(layer: Any, block: _Block, shared: _Shared) -> Callable[..., torch.Tensor]:
    own = layer.forward
    # Transformers wraps the class's forward in checkpointing, which this one goes past (or the call: then it does not).
    checkpointed = hasattr(type(layer).forward, "__wrapped__")

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or not shared.fits(block, hidden_states, kwargs):
            return own(hidden_states, *args, **kwargs)
        places = shared.places(*kwargs["position_embeddings"])
        rows = shared.function.rows if block.last and shared.trimmed else None
        factors = [None if one is None else one.weight for product in block.products for one in (product.a, product.b)]
        given = (hidden_states, block, places, rows, *factors)
        if checkpointed and layer.training and getattr(layer, "gradient_checkpointing", False):
            return layer._gradient_checkpointing_func(_Layer.apply, *given)
        return _Layer.apply(*given)

    return forward


@contextmanager
def fused_blocks(decoder: Any, function: PackedAttention, run: Callable[[], Any]) -> Iterator[int]:
    """While the block runs, layers of `decoder` compute by the above; yields how many do.

    `function` is what the model attends by; `run` sends a packed row through the model, on which layers are compared.
    """
    layers, shared, replaced = list(getattr(decoder, "layers", ())), _Shared(function), []
    blocks = [_block_of(layer, last=layer is layers[-1]) for layer in layers]
    try:
        if any(blocks) and next(decoder.parameters()).device.type == "cpu":
            shared.trimmed = False
            calls = _calls(layers, run)
            for layer, block in zip(layers, blocks, strict=True):
                args, given = calls.get(layer, ((), {}))
                if block is None or len(args) != 1 or not shared.fits(block, args[0], given):
                    continue
                forward = _forward(layer, block, shared)
                if _agrees(layer, forward, args[0], given):
                    layer.forward = forward
                    replaced.append(layer)
            shared.trimmed = True
        yield len(replaced)
    finally:
        for layer in replaced:
            del layer.forward


def _block_of(layer: Any, *, last: bool) -> _Block | None:
    """The parts of a layer that is built as this module computes it, as far as its modules say."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is None or mlp is None or _unknown(layer, "self_attn", "mlp", *_NORMS):
        return None
    norms = [norm_of(getattr(layer, name, None)) for name in _NORMS]
    joined = hasattr(attention, "qkv_proj")
    into = ("qkv_proj",) if joined else ("q_proj", "k_proj", "v_proj")
    up = ("gate_up_proj",) if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj")
    if _unknown(attention, *into, "o_proj") or _unknown(mlp, *up, "down_proj", "act_fn", "activation_fn"):
        return None
    named = [getattr(attention, name, None) for name in (*into, "o_proj")]
    named += [getattr(mlp, name, None) for name in (*up, "down_proj")]
    parts = [product_of(one) for one in named]
    products = [one for one in parts if one is not None]
    size, scale = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if len(products) < len(parts) or None in norms or not is_silu(mlp) or size is None or scale is None:
        return None
    first, second = (one for one in norms if one is not None)
    wide, count = products[len(into)].base.in_features, sum(one.base.out_features for one in products[: len(into)])
    heads = Heads(wide // size, (count - wide) // size // 2, size, float(scale))
    alike = {one.dtype for one in products} | {one.weight.dtype for one in (first, second)}
    known = len(alike) == 1 and alike <= block_math.TYPES.keys()
    whole = heads.keys > 0 and heads.queries % heads.keys == 0 and heads.all * size == count and size % 2 == 0
    if not known or not whole or getattr(attention, "attention_dropout", None):
        return None
    out, down = products[len(into)], products[-1]
    gate_up = tuple(products[len(into) + 1 : -1])
    config = getattr(attention, "config", None)
    window = getattr(attention, "sliding_window", None) or getattr(config, "sliding_window", None)
    return _Block(tuple(products[: len(into)]), out, gate_up, down, (first, second), heads, window, last)


_NORMS = ("input_layernorm", "post_attention_layernorm")


def _unknown(module: Any, *names: str) -> bool:
    """Whether it has parts beyond these (a dropout that drops nothing is none)."""
    idle = [name for name, one in module.named_children() if isinstance(one, torch.nn.Dropout) and not one.p]
    return bool({name for name, _ in module.named_children()} - {*names, *idle})


def _calls(layers: Sequence[Any], run: Callable[[], Any]) -> dict[Any, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each layer is called with."""
    calls: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[layer] = (args, kwargs)

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _agrees(layer: Any, forward: Callable[..., torch.Tensor], entered: torch.Tensor, given: Mapping[str, Any]) -> bool:
    """Whether both give the same and the same gradients, the residual connection left aside."""
    trained = [one for one in layer.parameters() if one.requires_grad]
    draw = torch.Generator().manual_seed(0)
    upstream = torch.randn(entered.shape, generator=draw).to(entered.dtype)
    results = []
    was_training = layer.training
    layer.train(False)  # dropout draws anew each time
    try:
        for function in (layer.forward, forward):
            x = entered.detach().clone().requires_grad_()
            with torch.enable_grad():
                out = function(x, **given)
            first, *others = torch.autograd.grad(out, [x, *trained], upstream)
            results.append([out.detach() - x.detach(), first - upstream, *others])
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
        return False
    finally:
        layer.train(was_training)
    exact = entered.dtype == torch.float32
    return all(agree(one, other, EXACT if exact else AGREES) for one, other in zip(*results, strict=True))
