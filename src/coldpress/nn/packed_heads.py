"""Causal attention of short records straight out of a row of queries, keys and values: no autograd, few kernels.

    row     [T, (H + 2 H_kv) D]           what the products yield
    states  [H + 2 H_kv, n L, D]          each head's records, filled up at the right with zeros; q and k turned
    P = softmax(s Q K^T + causal);  O = P V
    dV = P^T dO;  dS = P * (dO V^T - rowsum(dO V^T * P));  dQ = s dS K;  dK = s dS^T Q

Between the products with Q, K, V and P stand the kernels of `kernels.decoder_rows`.

    T   tokens      H, H_kv   heads of queries, of keys      D   head size      n, L   records of a bucket, their length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coldpress.nn.block_math import FILLING, join, softmax_, softmax_backward_, spread
from coldpress.nn.packed_attention import Bucket, Segments

__all__ = ["Attended", "Heads", "Places", "attend", "attend_backward", "places_of"]

SHARES_KEPT = 64
"""Length up to which P is kept for the way back: L numbers a head and token. Beyond, it is computed again."""


@dataclass(frozen=True)
class Heads:
    """What a layer's attention is made of."""

    queries: int
    keys: int
    size: int
    scale: float

    @property
    def turned(self) -> int:
        """Heads that the rotary embedding turns."""
        return self.queries + self.keys

    @property
    def all(self) -> int:
        return self.queries + 2 * self.keys


@dataclass(frozen=True)
class Places:
    """Where the tokens of a row stand in its buckets."""

    buckets: tuple[Bucket, ...]
    takes: tuple[torch.Tensor, ...]
    """[n L], int32, for each bucket: the token of the row at each position, or FILLING."""
    owns: tuple[torch.Tensor, ...]
    """The same without the tokens that another position speaks for: those that all records begin with."""
    angles: tuple[torch.Tensor, torch.Tensor]
    """cos and sin [T, D], their halves alike."""


Attended = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Queries, keys and values [H n, L, D] (keys and values of H_kv heads), and P where it is kept."""


def places_of(segments: Segments, cos: torch.Tensor, sin: torch.Tensor) -> Places:
    """cos and sin [1, T, D], their halves alike."""
    takes = tuple(_take(bucket).to(torch.int32) for bucket in segments.buckets)
    owns = tuple(_own(*both) for both in zip(segments.buckets, takes, strict=True))
    return Places(segments.buckets, takes, owns, (cos[0].contiguous(), sin[0].contiguous()))


def _take(bucket: Bucket) -> torch.Tensor:
    if bucket.take is None or bucket.filling is None:
        return torch.arange(bucket.start, bucket.start + bucket.tokens)
    return (bucket.take + bucket.start).index_fill_(0, bucket.filling, FILLING)


def _own(bucket: Bucket, take: torch.Tensor) -> torch.Tensor:
    if not bucket.alike or bucket.back is None:
        return take
    return torch.full_like(take, FILLING).index_copy_(0, bucket.back, take.index_select(0, bucket.back))


def attend(row: torch.Tensor, places: Places, heads: Heads) -> tuple[torch.Tensor, list[Attended]]:
    """row [T, (H + 2 H_kv) D] -> [T, H D], and what the way back needs."""
    found, kept = row.new_empty((len(row), heads.queries * heads.size)), []
    for bucket, take, own in zip(places.buckets, places.takes, places.owns, strict=True):
        states = row.new_empty((heads.all, len(take), heads.size))
        spread(row, take, places.angles, heads.turned, states)
        query, key, value = _by_record(states, bucket, heads)
        shares = _shares(query, key, bucket, heads)
        out = torch.bmm(shares, _for_queries(value, bucket, heads))
        join(out.view(heads.queries, -1, heads.size), own, places.angles, 0, found)
        kept.append((query, key, value, shares if bucket.length <= SHARES_KEPT else None))
    return found, kept


def attend_backward(upstream: torch.Tensor, kept: Sequence[Attended], places: Places, heads: Heads) -> torch.Tensor:
    """[T, H D] -> gradient for the row [T, (H + 2 H_kv) D]."""
    shape, alike = (len(upstream), heads.all * heads.size), any(one.alike for one in places.buckets)
    found = upstream.new_zeros(shape) if alike else upstream.new_empty(shape)
    each = zip(places.buckets, places.takes, places.owns, kept, strict=True)
    for bucket, take, own, (query, key, value, shares) in each:
        if shares is None:
            shares = _shares(query, key, bucket, heads)
        # 0 at a filling position: nothing reads what it computes
        gradient = upstream.new_empty((heads.queries, len(take), heads.size))
        spread(upstream, own, places.angles, 0, gradient)
        gradient = gradient.view(query.shape)
        states = upstream.new_empty((heads.all, len(take), heads.size))
        for_query, for_key, for_value = _by_record(states, bucket, heads)
        every_key, every_value = (_for_queries(one, bucket, heads) for one in (key, value))
        for_scores = softmax_backward_(torch.bmm(gradient, every_value.transpose(1, 2)), shares, heads.scale)
        torch.bmm(for_scores, every_key, out=for_query)
        _onto_keys(for_scores, query, for_key, heads)
        _onto_keys(shares, gradient, for_value, heads)
        join(states, take, places.angles, heads.turned, found, adding=alike)
    return found


def _by_record(states: torch.Tensor, bucket: Bucket, heads: Heads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [heads * n, L, D], as views."""
    split = states.view(heads.all * bucket.records, bucket.length, heads.size)
    query, key, value = split.split([one * bucket.records for one in (heads.queries, heads.keys, heads.keys)])
    return query, key, value


def _for_queries(states: torch.Tensor, bucket: Bucket, heads: Heads) -> torch.Tensor:
    """[H_kv n, L, D] -> [H n, L, D]: each head of keys as often as queries share it."""
    if heads.keys == heads.queries:
        return states
    apart = states.view(heads.keys, 1, bucket.records, bucket.length, heads.size)
    return apart.expand(-1, heads.queries // heads.keys, -1, -1, -1).reshape(-1, bucket.length, heads.size)


def _shares(query: torch.Tensor, key: torch.Tensor, bucket: Bucket, heads: Heads) -> torch.Tensor:
    """P in the type of the queries."""
    return softmax_(torch.bmm(query, _for_queries(key, bucket, heads).transpose(1, 2)), heads.scale)


def _onto_keys(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, heads: Heads) -> None:
    """left^T right [H n, L, D], summed over the queries that share a head of keys, into `out` [H_kv n, L, D]."""
    if heads.keys == heads.queries:
        torch.bmm(left.transpose(1, 2), right, out=out)
        return
    each = torch.bmm(left.transpose(1, 2), right).view(heads.keys, heads.queries // heads.keys, *_flat(out, heads))
    torch.sum(each, 1, out=out.view(heads.keys, *_flat(out, heads)))


def _flat(out: torch.Tensor, heads: Heads) -> tuple[int, ...]:
    """(n, L, D)."""
    return (out.shape[0] // heads.keys, *out.shape[1:])
