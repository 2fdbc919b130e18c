"""The same arithmetic in fewer kernels and with fewer kept tensors, put in the place of Transformers' and PEFT's own.

    layer                     what autograd keeps of the original        what is kept here
    linear with an adapter    x in two types, A x, casts of A and B      x and A x
    RMS norm                  x in float32, x / rms, its rounding        x and 1 / rms [T, 1]
    rotary embedding          q and k several times                      cos and sin
    silu(gate) * up           gate, silu(gate), up                       gate and up

Each stand-in is tried against what it replaces, forward and backward, on random input, before it is used: a layer that
does not agree (Gemma's norm adds one to its weights, say) keeps its own code. So no table of model families is needed.
Everything is put back when the block ends. The formulas stand in `layer_math`; that of the rotary embedding, which is
used here alone, is equation 34 of Su et al. 2021.

    T   tokens      x [T, in]      W [out, in]      A [r, in]      B [out, r]      s   scale of the adapter
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from coldpress.nn.layer_math import (
    gated,
    gated_backward,
    low_rank,
    low_rank_backward,
    norm,
    norm_backward,
    random_mask,
)

__all__ = [
    "CASTS_KEPT",
    "EXACT",
    "ROUNDED",
    "Fused",
    "Norm",
    "Product",
    "agree",
    "fused_layers",
    "is_silu",
    "norm_of",
    "product_of",
]

Weight = Callable[[], torch.Tensor]

CASTS_KEPT = 1 << 20
"""Numbers of an adapter up to which its copy in the type of x is kept for the backward pass instead of made again."""
EXACT, ROUNDED = 1e-4, 2e-2
"""Relative differences, of the norm, that count as agreement in float32 and in 16 bits: the two sides round in
different places, and bfloat16 has 8 bits."""


class _LowRankLinear(torch.autograd.Function):  # type: ignore[misc]
    """x W^T + b + s (m * x) A^T B^T; W and b are frozen, m is the dropout's mask over 1 - p (or nothing)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        kept: torch.Tensor | None,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        own_a, own_b = a.to(x.dtype), b.to(x.dtype)
        out, inner = low_rank(flat, weight(), bias, own_a, own_b, scale, kept)
        small = a.numel() + b.numel() <= CASTS_KEPT
        ctx.save_for_backward(flat, inner, *((own_a, own_b) if small else (a, b)), kept)
        ctx.weight, ctx.scale, ctx.shape, ctx.dtypes = weight, scale, x.shape, (a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        flat, inner, a, b, kept = ctx.saved_tensors  # a and b perhaps in the type of x already
        gradient = upstream.reshape(-1, upstream.shape[-1])
        own_a, own_b = a.to(flat.dtype), b.to(flat.dtype)
        weight = ctx.weight() if ctx.needs_input_grad[0] else None
        for_x, for_a, for_b = low_rank_backward(gradient, flat, inner, weight, own_a, own_b, ctx.scale, kept)
        for_x = None if for_x is None else for_x.view(ctx.shape)
        return for_x, None, None, for_a.to(ctx.dtypes[0]), for_b.to(ctx.dtypes[1]), None, None


class _RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    """w * round(x / sqrt(mean(x^2) + eps)); the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, inverse = norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        return norm_backward(upstream, x, weight, inverse), None, None


class _GatedSilu(torch.autograd.Function):  # type: ignore[misc]
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        for_gate = torch.ops.aten.silu_backward(upstream * up, gate)
        return for_gate, torch.nn.functional.silu(gate).mul_(upstream)


class _GatedSiluJoined(torch.autograd.Function):  # type: ignore[misc]
    """silu(gate) * up of one matrix [gate | up], whose gradient is one matrix too."""

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        return gated(both)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        (both,) = ctx.saved_tensors
        return gated_backward(upstream, both)


class _Rotate(torch.autograd.Function):  # type: ignore[misc]
    """(x1 | x2) -> (x1 cos - x2 sin | x2 cos + x1 sin) on the first features of each head, the rest as it is.

    x [1, H, T, D]; cos and sin [1, 1, T, R/2].
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotated(upstream, cos, sin, -1.0), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    half = cos.shape[-1]
    out = torch.empty(x.transpose(1, 2).shape, dtype=x.dtype, device=x.device).transpose(1, 2)
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin, value=sign)
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def _rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
    """In the place of a model's `apply_rotary_pos_emb`: cos and sin [1, T, R], their halves alike."""
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half].unsqueeze(unsqueeze_dim), sin[..., :half].unsqueeze(unsqueeze_dim)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


# -- in the place of what ----------------------------------------------------------------------------------------------


@dataclass
class Fused:
    """What was replaced."""

    counts: Counter[str] = field(default_factory=Counter)
    """Layers of each kind."""
    trained: set[int] = field(default_factory=set)
    """Identities of the trained parameters whose products are made in the layer's own type, whatever theirs is."""


@contextmanager
def fused_layers(model: Any) -> Iterator[Fused]:
    """While the block runs, layers of `model` compute by the functions above."""
    found = Fused()
    undo: list[Callable[[], None]] = []
    try:
        for module in model.modules():
            for kind, make in _STAND_INS.items():
                forward = make(module)
                if forward is not None and _agrees(module, forward):
                    module.forward = forward
                    undo.append(lambda module=module: module.__dict__.pop("forward", None))  # type: ignore[misc]
                    found.counts[kind] += 1
                    if make is _linear:
                        found.trained |= {id(one) for one in module.parameters() if one.requires_grad}
        for owner in _rotary_owners(model):
            if _rotates_alike(owner.apply_rotary_pos_emb):
                original = owner.apply_rotary_pos_emb
                owner.apply_rotary_pos_emb = _rotary
                undo.append(lambda owner=owner, original=original: setattr(owner, "apply_rotary_pos_emb", original))  # type: ignore[misc]
                found.counts["rotary"] += 1
        yield found
    finally:
        for one in reversed(undo):
            one()


@dataclass(frozen=True)
class Product:
    """A frozen linear layer with one plain LoRA adapter, or with none."""

    module: Any
    base: torch.nn.Linear
    weight: Weight
    dtype: torch.dtype
    """Of the product."""
    a: torch.nn.Linear | None = None
    b: torch.nn.Linear | None = None
    scale: float = 1.0
    dropped: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether the adapter is on now, and not added to the weight."""
        return self.a is None or not (self.module.disable_adapters or self.module.merged)

    def bias(self) -> torch.Tensor | None:
        return None if self.base.bias is None else self.base.bias.to(self.dtype)

    def mask(self, x: torch.Tensor) -> tuple[torch.Tensor | None, float]:
        """The dropout's mask for x, if there is one, and the scale that goes with it: 1 - p is divided out there."""
        if self.a is None or not (self.module.training and self.dropped):
            return None, self.scale
        return random_mask(x, self.dropped), self.scale / (1 - self.dropped)


def product_of(module: Any) -> Product | None:
    """PEFT's LoRA layer with one plain adapter on a frozen linear one, or that one alone."""
    base = getattr(module, "base_layer", module)
    if not isinstance(base, torch.nn.Linear) or any(one.requires_grad for one in base.parameters()):
        return None
    weight, dtype = _weight_of(base)
    if weight is None:
        return None
    if base is module:
        return Product(module, base, weight, dtype)
    if len(getattr(module, "lora_A", ())) != 1:
        return None
    (name,) = module.lora_A.keys()
    a, b = module.lora_A[name], module.lora_B[name]
    plain = name in module.active_adapters and not module.lora_variant.get(name) and not module.lora_bias.get(name)
    if not plain or a.bias is not None or b.bias is not None:
        return None
    dropout = module.lora_dropout[name]
    dropped = float(dropout.p) if isinstance(dropout, torch.nn.Dropout) else 0.0
    return Product(module, base, weight, dtype, a, b, float(module.scaling[name]), dropped)


def _linear(module: Any) -> Callable[..., torch.Tensor] | None:
    product = product_of(module) if hasattr(module, "base_layer") else None
    if product is None:
        return None
    assert product.a is not None
    assert product.b is not None
    own_forward, a, b = type(module).forward, product.a, product.b

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not product.usable:
            return own_forward(module, x, *args, **kwargs)
        x = x.to(product.dtype)
        kept, scale = product.mask(x.reshape(-1, x.shape[-1]))
        return _LowRankLinear.apply(x, product.weight, product.bias(), a.weight, b.weight, scale, kept)

    return forward


def _weight_of(base: Any) -> tuple[Weight | None, torch.dtype]:
    """The frozen matrix in the type it is computed in: as it lies, or dequantized anew at each use."""
    kind = type(base).__name__
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        dtype = base.compute_dtype or torch.float32
        return lambda: dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype), dtype
    if type(base) is not torch.nn.Linear:
        return None, base.weight.dtype
    return lambda: base.weight, base.weight.dtype


@dataclass(frozen=True)
class Norm:
    """A frozen RMS norm."""

    module: Any
    eps: float

    @property
    def weight(self) -> torch.Tensor:
        """Read when it is used: FSDP puts other tensors in its place."""
        found: torch.Tensor = self.module.weight
        return found


def norm_of(module: Any) -> Norm | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    named = type(module).__name__.endswith("RMSNorm")
    if not named or not isinstance(weight, torch.nn.Parameter) or weight.requires_grad or not isinstance(eps, float):
        return None
    return Norm(module, eps)


def _norm(module: Any) -> Callable[..., torch.Tensor] | None:
    found = norm_of(module)
    return None if found is None else lambda x: _RmsNorm.apply(x, found.weight, found.eps)


def is_silu(module: Any) -> bool:
    """Whether the activation of an MLP is SiLU."""
    activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def _gated(module: Any) -> Callable[..., torch.Tensor] | None:
    if not is_silu(module):
        return None
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
        return lambda x: module.down_proj(_GatedSilu.apply(module.gate_proj(x), module.up_proj(x)))
    if all(hasattr(module, name) for name in ("gate_up_proj", "down_proj")) and _is_linear(module.gate_up_proj):
        return lambda x: module.down_proj(_GatedSiluJoined.apply(module.gate_up_proj(x)))
    return None


def _is_linear(module: Any) -> bool:
    return isinstance(getattr(module, "base_layer", module), torch.nn.Linear)


_STAND_INS: dict[str, Callable[[Any], Callable[..., torch.Tensor] | None]] = {
    "adapted linear": _linear,
    "norm": _norm,
    "gated": _gated,
}


def _agrees(module: Any, forward: Callable[..., torch.Tensor]) -> bool:
    """Whether both give the same output and the same gradients on a little random input."""
    width, dtype = _input_of(module)
    device = next(module.parameters()).device
    draw = torch.Generator().manual_seed(0)
    sample = torch.randn((1, 3, width), generator=draw).to(device=device, dtype=dtype)
    upstream: torch.Tensor | None = None
    results = []
    was_training = module.training
    module.train(False)  # dropout draws anew each time
    try:
        for function in (module.forward, forward):
            x = sample.clone().requires_grad_()
            trained = [one for one in module.parameters() if one.requires_grad]
            with torch.enable_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out = function(x)
            if upstream is None:
                upstream = torch.randn(out.shape, generator=draw).to(out)
            gradients = torch.autograd.grad(out, [x, *trained], upstream.to(out.dtype), allow_unused=True)
            results.append([out.detach(), *gradients])
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False  # it wants other input than this: its own code stays
    finally:
        module.train(was_training)
    allowed = EXACT if dtype == torch.float32 else ROUNDED
    return all(agree(one, other, allowed) for one, other in zip(*results, strict=True))


def agree(one: torch.Tensor | None, other: torch.Tensor | None, allowed: float) -> bool:
    """Whether the difference of two results is small to the norm of the first."""
    if one is None or other is None:
        return one is other
    if one.shape != other.shape:
        return False
    difference = (one.float() - other.float()).norm()
    return bool(difference <= allowed * one.float().norm() + 1e-6)


def _input_of(module: Any) -> tuple[int, torch.dtype]:
    """Width and type of what a layer takes."""
    linear = getattr(module, "gate_proj", getattr(module, "gate_up_proj", module))
    base = getattr(linear, "base_layer", linear)
    width = getattr(base, "in_features", None) or int(base.weight.shape[-1])
    dtype = getattr(base, "compute_dtype", None) or base.weight.dtype
    return int(width), dtype if dtype.is_floating_point else torch.float32


def _rotary_owners(model: Any) -> list[Any]:
    """Modules of Transformers whose attention calls an `apply_rotary_pos_emb` of their own."""
    names = {type(module).__module__ for module in model.modules()}
    owners = (sys.modules.get(name) for name in sorted(names))
    return [one for one in owners if one is not None and callable(getattr(one, "apply_rotary_pos_emb", None))]


def _rotates_alike(original: Callable[..., Any]) -> bool:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn((1, 2, 3, 8), generator=draw), torch.randn((1, 1, 3, 8), generator=draw)
    angles = torch.randn((1, 3, 4), generator=draw)
    both = torch.cat((angles, angles), dim=-1)
    results = []
    functions: tuple[Callable[..., Any], ...] = (original, _rotary)
    try:
        for function in functions:
            own = [one.clone().requires_grad_() for one in (q, k)]
            with torch.enable_grad():
                out = function(*own, both.cos(), both.sin())
                gradients = torch.autograd.grad(sum(one.square().sum() * 3 + one.sum() for one in out), own)
            results.append([*(one.detach() for one in out), *gradients])
    except (RuntimeError, TypeError, ValueError):
        return False
    return all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*results, strict=True))
