"""The kernels of `kernels.decoder_rows` on CPU tensors, shared among as many threads as torch uses.

T tokens, d width, D head size; n records of one length L.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from coldpress.kernels.decoder_rows import DecoderRows

__all__ = [
    "FILLING",
    "TYPES",
    "Dropout",
    "add_dropped",
    "draw_seeds",
    "dropped",
    "gate",
    "gate_backward",
    "join",
    "narrowed",
    "norm",
    "norm_backward",
    "softmax_",
    "softmax_backward_",
    "spread",
    "widened",
]

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What the kernels compute in, and their name for it."""

FILLING = -1
"""A position of `take` at which no token stands."""
SHARED = 1 << 18
"""Numbers that are worth another thread."""


@dataclass(frozen=True)
class Dropout:
    """A mask over the rows of one product."""

    seeds: tuple[int, int]
    probability: float
    limit: int = field(init=False)
    """Hashes below it drop their value."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", min(round(self.probability * 2**32), 2**32 - 1))


def draw_seeds(count: int) -> list[tuple[int, int]]:
    """From torch's own generator, whose state a checkpoint keeps."""
    drawn = torch.empty(2 * count, dtype=torch.int64).random_(0, 1 << 32).tolist()
    return list(zip(drawn[::2], drawn[1::2], strict=True))


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """w * round(x / sqrt(mean(x^2) + eps)) of x [T, d], and 1 / sqrt(...) [T] float32."""
    assert weight.dtype == x.dtype
    out, inverse = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    _run(_kernels(x).norm, x.numel(), *x.shape, _at(x), _at(weight), eps, _at(out), _at(inverse))
    return out, inverse


def norm_backward(
    upstream: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, onto: torch.Tensor
) -> torch.Tensor:
    """`onto` with the gradient for x added to it, in place."""
    given = _at(upstream), _at(x), _at(weight), _at(inverse), _at(onto)
    _run(_kernels(x).norm_backward, x.numel(), *x.shape, *given)
    return onto


def gate(both: torch.Tensor) -> torch.Tensor:
    """silu(g) u of [g | u] [T, 2 d]."""
    out = both.new_empty((len(both), both.shape[1] // 2))
    _run(_kernels(both).gate, both.numel(), *out.shape, _at(both), _at(out))
    return out


def gate_backward(upstream: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
    """Gradient for [g | u], one matrix too."""
    gradient = torch.empty_like(both)
    _run(_kernels(both).gate_backward, both.numel(), *upstream.shape, _at(upstream), _at(both), _at(gradient))
    return gradient


def dropped(x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """x where the mask says so, else 0. Not divided by 1 - p: that goes into the scale of the adapter."""
    if dropout is None:
        return x
    out = torch.empty_like(x)
    _run(_kernels(x).dropped, x.numel(), *x.shape, _at(x), *dropout.seeds, dropout.limit, _at(out))
    return out


def add_dropped(onto: torch.Tensor, x: torch.Tensor, dropout: Dropout) -> None:
    """`dropped(x)` added in place."""
    _run(_kernels(x).add_dropped, x.numel(), *x.shape, _at(x), *dropout.seeds, dropout.limit, _at(onto))


def softmax_(scores: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal shares of scores [H n, L, L], in place."""
    _run(_kernels(scores).softmax, scores.numel(), *scores.shape[:2], _at(scores), scale)
    return scores


def softmax_backward_(upstream: torch.Tensor, shares: torch.Tensor, scale: float) -> torch.Tensor:
    """Gradient for the scores, in the place of that for the shares."""
    _run(_kernels(shares).softmax_backward, shares.numel(), *shares.shape[:2], _at(upstream), _at(shares), scale)
    return upstream


def spread(
    row: torch.Tensor, take: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], turned: int, states: torch.Tensor
) -> None:
    """The heads of row [T, H D] apart into states [H, n L, D], the first `turned` of them turned by cos, sin [T, D]."""
    heads, places, size = states.shape
    given = heads, size, turned, places, _at(row), _at(take), *map(_at, angles), _at(states)
    _run(_kernels(row).spread, states.numel(), places, *given)


def join(
    states: torch.Tensor,
    take: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    turned: int,
    row: torch.Tensor,
    *,
    adding: bool = False,
) -> None:
    """The other way, turned back; `adding` to what stands in the row, as a token that is taken twice needs it."""
    heads, places, size = states.shape
    given = heads, size, turned, places, adding, _at(states), _at(take), *map(_at, angles), _at(row)
    # Threads must not add to the same token.
    _run(_kernels(row).join, 0 if adding else states.numel(), places, *given)


def narrowed(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """scale x [n, m] float32 in another type, rounded once."""
    if x.dtype != torch.float32 or (scale == 1.0 and x.dtype == dtype):
        return (x if scale == 1.0 else x * scale).to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    _run(_of_type(dtype).narrow, x.numel(), x.numel(), _at(x), scale, _at(out))
    return out


def widened(x: torch.Tensor, scale: float) -> torch.Tensor:
    """scale x [n, m] in float32."""
    out = torch.empty_like(x, dtype=torch.float32)
    _run(_kernels(x).widen, x.numel(), x.numel(), _at(x), scale, _at(out))
    return out


def _kernels(x: torch.Tensor) -> DecoderRows:
    return _of_type(x.dtype)


@functools.cache
def _of_type(dtype: torch.dtype) -> DecoderRows:
    from coldpress.kernels.decoder_rows import decoder_rows  # with Numba, which a short training is spared

    return decoder_rows(TYPES[dtype])


def _run(kernel: Callable[..., None], numbers: int, count: int, *given: Any) -> None:
    """On all rows; in several threads where there are enough numbers for them."""
    if numbers < 2 * SHARED or (threads := min(torch.get_num_threads(), numbers // SHARED, count)) < 2:
        kernel(0, count, *given)
        return
    (_, own), *parts = pairwise(count * part // threads for part in range(threads + 1))
    others = [_pool(threads - 1).submit(kernel, *part, *given) for part in parts]
    kernel(0, own, *given)
    for one in others:
        one.result()


def _at(tensor: torch.Tensor) -> int:
    """Its address; the kernels know of no strides."""
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has the strides {tensor.stride()}")
    found: int = tensor.data_ptr()
    return found


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="rows")
