"""Attention over records that stand one behind the other in one row, each seeing only itself.

    tokens      r0 r0 r0 r1 r1 r2 r2 r2 r2      T of them, no padding: norms, products and losses run on these
    buckets     r0 r0 r0 .                      records of like length side by side, filled up at the right; attention
                r2 r2 r2 r2                     runs on these, a kernel call for each bucket
                r1 r1

Tokens that all records begin with may stand in the row once, before all others: what is computed of them does not
depend on the record. In a bucket they stand at the head of each record.

    tokens      s s r0 r1 r1 r2 r2 r2           buckets     s s r0 .     s s r2 r2 r2 ...

Filling up at the right needs no mask: a causal model never looks right, and what a filling position computes is left
out. So the kernels are Transformers' own (SDPA; the model's eager function where it has softcaps or sinks), called on
ordinary batches, and the result is that of a batch of single records. On an NVIDIA GPU, plain causal attention in
16 bits goes to torch's variable-length kernel instead, which needs no filling.

    T   tokens          H   heads          D   head size          n, L   records and length of a bucket
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

__all__ = ["NAME", "SHORT", "Bucket", "PackedAttention", "Segments", "packed_attention", "segments_of"]

NAME = "coldpress_packed"
"""How Transformers' attention interface knows this function."""

WASTE = 0.25
"""Part of a bucket's pairs (length squared) that may be filling, where that costs more than a kernel call."""
CHEAP = 1 << 16
"""Filling pairs that cost less than another kernel call."""
ROUNDING = 8
"""A bucket's length is a multiple of it, so that there are few shapes."""
SHORT = 160
"""Up to this length, torch's CPU kernel is slower backward than plain matrix products: by a factor of 4 at 24 tokens
(measured in bfloat16, on one thread); at 288 it is the quicker one."""


@dataclass(frozen=True)
class Bucket:
    """Records that one kernel call takes."""

    records: int
    length: int
    start: int
    """First of its tokens; a bucket's tokens stand together."""
    tokens: int
    take: torch.Tensor | None
    """[records * length]: which token (of the bucket's) stands at each position; None where nothing is filled up."""
    back: torch.Tensor | None
    """[tokens]: at which position each token stands."""
    filling: torch.Tensor | None
    """Positions that are filling."""
    alike: bool = False
    """Records begin with the same tokens: `start` and `tokens` are those of the row, and `back` leads to those tokens
    that are the bucket's own."""


@dataclass(frozen=True)
class Segments:
    """Where each record of a row lies."""

    lengths: tuple[int, ...]
    """Tokens of each record, in order; longest first, so that buckets are runs."""
    buckets: tuple[Bucket, ...]
    borders: torch.Tensor
    """[records + 1], int32: cumulative lengths."""
    positions: torch.Tensor
    """[1, T]: the place of each token in its record."""
    shared: int = 0
    """Tokens that all records begin with, which stand in the row once."""

    def to(self, device: Any) -> Segments:
        """The same with its tensors on a device."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        buckets = (
            replace(one, take=moved(one.take), back=moved(one.back), filling=moved(one.filling)) for one in self.buckets
        )
        borders, positions = (one.to(device, non_blocking=True) for one in (self.borders, self.positions))
        return Segments(self.lengths, tuple(buckets), borders, positions, self.shared)


def segments_of(lengths: Sequence[int], shared: int = 0) -> Segments:
    """The layout of records with these lengths, which must be sorted, longest first; the first `shared` tokens of all
    of them stand in the row once."""
    assert all(a >= b > shared for a, b in pairwise([*lengths, lengths[-1]])), "longest first"
    buckets, start, token = [], 0, shared
    total = shared + sum(lengths) - shared * len(lengths)
    for stop in _cuts(lengths):
        part = lengths[start:stop]
        buckets.append(_beginning_alike(part, token, shared, total) if shared else _bucket(part, token))
        start, token = stop, token + sum(part) - shared * len(part)
    borders = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    borders[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    positions = torch.cat([torch.arange(shared), *(torch.arange(shared, length) for length in lengths)]).unsqueeze(0)
    return Segments(tuple(lengths), tuple(buckets), borders, positions, shared)


def _cuts(lengths: Sequence[int]) -> Iterator[int]:
    """Where buckets end: as many records as go without too much filling."""
    start = filled = 0
    for place, length in enumerate(lengths):
        whole = lengths[start] ** 2
        filled += whole - length**2
        if filled > CHEAP and filled > WASTE * whole * (place - start + 1):
            yield place
            start, filled = place, 0
    yield len(lengths)


def _bucket(lengths: Sequence[int], start: int) -> Bucket:
    longest, tokens = -(-lengths[0] // ROUNDING) * ROUNDING, sum(lengths)
    if lengths[-1] == longest:
        return Bucket(len(lengths), longest, start, tokens, None, None, None)
    size = torch.tensor(lengths)
    place = torch.arange(longest)
    real = place.unsqueeze(0) < size.unsqueeze(1)
    first = size.cumsum(0) - size
    take = torch.where(real, first.unsqueeze(1) + place.unsqueeze(0), first.unsqueeze(1)).reshape(-1)
    flat = real.reshape(-1)
    return Bucket(len(lengths), longest, start, tokens, take, flat.nonzero().squeeze(1), (~flat).nonzero().squeeze(1))


def _beginning_alike(lengths: Sequence[int], start: int, shared: int, total: int) -> Bucket:
    """A bucket of records whose own tokens begin at `start` of a row of `total`."""
    longest = -(-lengths[0] // ROUNDING) * ROUNDING
    size = torch.tensor(lengths).unsqueeze(1)
    place = torch.arange(longest).unsqueeze(0)
    real = place < size
    first = start + (size - shared).cumsum(0) - size  # the shared ones that are not there counted as well
    take = torch.where(place < shared, place, first + place).where(real, 0).reshape(-1)
    own = real & (place >= shared)
    own[0] |= real[0] & (start == shared)  # the row's first record speaks for all
    back, filling = (one.reshape(-1).nonzero().squeeze(1) for one in (own, ~real))
    return Bucket(len(lengths), longest, 0, total, take, back, filling, alike=True)


class _FillUp(torch.autograd.Function):  # type: ignore[misc]
    """[tokens, ...] -> [records * length, ...]. A filling position has no gradient: nothing reads what it computes."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, take: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return tokens.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (back,) = ctx.saved_tensors
        return gradient.index_select(0, back), None, None


class _TakeBack(torch.autograd.Function):  # type: ignore[misc]
    """[records * length, ...] -> [tokens, ...]: the inverse, without what is filling."""

    @staticmethod
    def forward(
        ctx: Any, filled: torch.Tensor, take: torch.Tensor, back: torch.Tensor, filling: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(take, filling)
        return filled.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        take, filling = ctx.saved_tensors
        return gradient.index_select(0, take).index_fill_(0, filling, 0), None, None, None


class _ShortCausal(torch.autograd.Function):  # type: ignore[misc]
    """Causal attention on a CPU: torch's kernel forward, plain matrix products backward. [n, H, L, D] each.

    P = exp(s Q K^T - lse);  dV = P^T dO;  dS = P * (dO V^T - rowsum(dO * O));  dQ = s dS K;  dK = s dS^T Q
    (Dao et al. 2022, appendix B.2).
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, attn_mask=None, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        saved = ctx.saved_tensors
        shape, length = upstream.shape, upstream.shape[2]
        query, key, value, out = (one.flatten(0, 1) for one in saved[:4])
        gradient = upstream.flatten(0, 1)
        later = torch.ones((length, length), dtype=torch.bool, device=upstream.device).triu_(1)
        scores = torch.bmm(query, key.transpose(1, 2)).float().mul_(ctx.scale)
        shares = scores.sub_(saved[4].reshape(-1, length, 1)).exp_().masked_fill_(later, 0).to(query.dtype)
        for_value = torch.bmm(shares.transpose(1, 2), gradient)
        own = (gradient * out).sum(-1, keepdim=True, dtype=torch.float32).to(query.dtype)
        for_scores = torch.bmm(gradient, value.transpose(1, 2)).sub_(own).mul_(shares)
        for_query = torch.bmm(for_scores, key).mul_(ctx.scale)
        for_key = torch.bmm(for_scores.transpose(1, 2), query).mul_(ctx.scale)
        return for_query.view(shape), for_key.view(shape), for_value.view(shape), None


Kernel = Callable[..., tuple[torch.Tensor, Any]]


class PackedAttention:
    """What Transformers' attention modules call. `segments` are those of the row that is being computed."""

    def __init__(self, kernel: Kernel, *, masked: bool) -> None:
        self.kernel = kernel
        self.masked = masked
        """The kernel must be given a causal mask: it makes none itself."""
        self.segments: Segments | None = None
        self.rows: torch.Tensor | None = None
        """Of the row, what is wanted of its last layer; None is all."""

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        sliding_window: int | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [1, H, T, D], key and value [1, H_kv, T, D]; yields [1, T, H, D]."""
        segments = self.segments
        assert segments is not None
        assert query.shape[0] == 1
        if attention_mask is not None:
            raise ValueError("a packed row has no attention mask")
        if _has_varlen(query, options):
            return _varlen(query, key, value, segments, sliding_window, options), None
        states = [one[0].transpose(0, 1) for one in (query, key, value)]  # [T, heads, D]
        found = [self._run(module, states, bucket, sliding_window, options) for bucket in segments.buckets]
        return (found[0] if len(found) == 1 else torch.cat(found)).unsqueeze(0), None

    def _run(
        self, module: torch.nn.Module, states: list[torch.Tensor], bucket: Bucket, window: int | None, options: Any
    ) -> torch.Tensor:
        """[tokens of the bucket, H, D]."""
        own = [one.narrow(0, bucket.start, bucket.tokens) for one in states]
        if bucket.alike:
            own = [one.index_select(0, bucket.take) for one in own]
        elif bucket.take is not None:
            own = [_FillUp.apply(one, bucket.take, bucket.back) for one in own]
        batch = [one.unflatten(0, (bucket.records, bucket.length)).transpose(1, 2) for one in own]
        if bucket.length <= SHORT and not self.masked and _is_plain(batch, bucket.length, window, options):
            scale = options.get("scaling") or batch[0].shape[-1] ** -0.5
            out = _ShortCausal.apply(*batch, scale).transpose(1, 2).flatten(0, 1)
        else:
            mask = self._mask(bucket.length, window, batch[0])
            out = self.kernel(module, *batch, mask, **options)[0].flatten(0, 1)
        if bucket.alike:
            return out.index_select(0, bucket.back)
        if bucket.take is None:
            return out
        return _TakeBack.apply(out, bucket.take, bucket.back, bucket.filling)

    def _mask(self, length: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
        """None where the kernel is causal by itself, else [1, 1, L, L]."""
        narrow = window is not None and length > window
        if not (self.masked or narrow):
            return None
        place = torch.arange(length, device=like.device)
        seen = place.unsqueeze(0) <= place.unsqueeze(1)
        if narrow:
            seen = seen & (place.unsqueeze(0) > place.unsqueeze(1) - (window or 0))
        if not self.masked:
            return seen[None, None]
        lowest = torch.finfo(like.dtype).min
        return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill_(~seen, lowest)[None, None]


def _is_plain(batch: list[torch.Tensor], length: int, window: int | None, options: Any) -> bool:
    """Causal attention and nothing else, on a CPU, each query head with a key head of its own."""
    query, key, value = batch
    alike = query.shape == key.shape == value.shape and query.device.type == "cpu"
    others = bool(options.get("dropout")) or _extras(options)
    return alike and not others and (window is None or length <= window)


def _extras(options: Any) -> bool:
    return any(options.get(name) is not None for name in ("s_aux", "position_bias", "softcap"))


def _has_varlen(query: torch.Tensor, options: Any) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and not _extras(options) and not options.get("dropout") and query.shape[-1] <= 256


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: int | None,
    options: Any,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert not segments.shared, "each record lies in the row as a whole"
    longest = segments.lengths[0]
    states = [one[0].transpose(0, 1).contiguous() for one in (query, key, value)]
    out = varlen_attn(
        *states,
        segments.borders,
        segments.borders,
        longest,
        longest,
        scale=options.get("scaling"),
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out.unsqueeze(0)


@contextmanager
def packed_attention(model: Any) -> Iterator[PackedAttention]:
    """While the block runs, `model` (Transformers') attends within the records of `segments` of what this yields."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    used = model.config._attn_implementation
    eager = used == "eager"
    kernel = _eager_of(model) if eager else ALL_ATTENTION_FUNCTIONS["sdpa"]
    function = PackedAttention(kernel, masked=eager)
    AttentionInterface.register(NAME, function)
    for config in configs.values():
        config._attn_implementation_internal = NAME
    try:
        yield function
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def _eager_of(model: Any) -> Kernel:
    """The eager attention function of a model, which stands in the module of its attention classes."""
    import sys

    for module in model.modules():
        found = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
        if found is not None and "Attention" in type(module).__name__:
            return found  # type: ignore[no-any-return]
    raise ValueError("the model has no eager attention function of Transformers' form")
