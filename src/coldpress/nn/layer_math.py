"""The arithmetic of decoder layers, forward and backward, in few kernels: plain functions on matrices, no autograd.

Formulas: Hu et al. 2021, section 4.1 (LoRA); Zhang and Sennrich 2019, equation 4 (RMS norm); Shazeer 2020, equation 6
(SwiGLU); Srivastava et al. 2014 (dropout).

    T   tokens      x [T, in]      W [out, in]      A [r, in]      B [out, r]      s   scale of the adapter
    m   mask of a dropout, a byte a value: -1 where the value stays, 0 where it is dropped
"""

from __future__ import annotations

import torch

__all__ = [
    "dropped_out",
    "gated",
    "gated_backward",
    "low_rank",
    "low_rank_backward",
    "norm",
    "norm_backward",
    "random_mask",
]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_mask(like: torch.Tensor, dropped: float) -> torch.Tensor:
    """The mask m for `like`: Bernoulli(1 - dropped), from 16 random bits a value instead of a float each."""
    count = like.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64, device=like.device).random_(-(2**63), None)
    limit = round(dropped * 65536) - 32768
    own = bits.view(torch.int16)[:count]
    # Into its own type first: a comparison that yields another one is not vectorized.
    return torch.ge(own, limit, out=own).to(torch.int8).neg_().view(like.shape)


def dropped_out(x: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """x where the mask says so, else 0. Not divided by 1 - p: that goes into the scale of the adapter."""
    if kept is None:
        return x
    # On the bits of the numbers: a product of two types takes much longer on a CPU.
    bits = _BITS[x.element_size()]
    return (x.view(bits) & kept.to(bits)).view(x.dtype)


def low_rank(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T + bias + s (m * x) A^T B^T, and (m * x) A^T for the way back. All of one type."""
    inner = torch.mm(dropped_out(x, kept), a.t())
    out = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    return out.addmm_(inner, b.t(), alpha=scale), inner


def low_rank_backward(
    upstream: torch.Tensor,
    x: torch.Tensor,
    inner: torch.Tensor,
    weight: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    kept: torch.Tensor | None,
    onto: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients for x, A and B; none for x where `weight` is None. `onto`: what x's is added to, in place."""
    for_inner = torch.mm(upstream, b)
    for_b = torch.mm(upstream.t(), inner)
    if scale != 1.0:
        for_inner.mul_(scale)
        for_b.mul_(scale)
    for_a = torch.mm(for_inner.t(), dropped_out(x, kept))
    if weight is None:
        return None, for_a, for_b
    for_x = torch.mm(upstream, weight) if onto is None else onto.addmm_(upstream, weight)
    if kept is None:
        for_x.addmm_(for_inner, a)
    else:
        for_x += dropped_out(torch.mm(for_inner, a), kept)
    return for_x, for_a, for_b


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """w * round(x / sqrt(mean(x^2) + eps)), and 1 / sqrt(...) [..., 1] in float32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return _scaled(x, inverse).to(x.dtype) * weight, inverse


def norm_backward(upstream: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Gradient for x."""
    unit = _scaled(x, inverse)
    gradient = (upstream * weight).float()
    mean = torch.linalg.vecdot(gradient, unit).div_(-x.shape[-1]).unsqueeze(-1)
    return gradient.addcmul_(unit, mean).mul_(inverse).to(x.dtype)


def _scaled(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """x * inverse in float32."""
    return x * inverse if x.dtype == torch.float32 else x.float().mul_(inverse)


def gated(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of one matrix [gate | up]."""
    gate, up = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def gated_backward(upstream: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
    """Gradient for [gate | up], one matrix too."""
    gate, up = both.chunk(2, dim=-1)
    gradient = torch.empty_like(both)
    for_gate, for_up = gradient.chunk(2, dim=-1)
    torch.mul(torch.nn.functional.silu(gate), upstream, out=for_up)
    torch.ops.aten.silu_backward.grad_input(upstream * up, gate, grad_input=for_gate)
    return gradient
