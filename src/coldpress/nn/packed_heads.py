"""Causal attention of short records straight out of a row of queries, keys and values: no autograd, few kernels.

    row     [T, H + 2 H_kv, D]            what the products yield, a bucket's tokens side by side
    states  [H + 2 H_kv, n L, D]          gathered by one index: each head's records, filled up at the right
    P = softmax(s Q K^T + causal);  O = P V
    dV = P^T dO;  dS = P * (dO V^T - rowsum(dO V^T * P));  dQ = s dS K;  dK = s dS^T Q

Rotary embedding (Su et al. 2021, equation 34) as x * cos + swapped(x) * (-sin | sin), in place on the gathered states,
where all heads' numbers stand in one row that the angles' row [n L D] goes along with.

    T   tokens      H, H_kv   heads of queries, of keys      D   head size      n, L   records of a bucket, their length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
    """Where a bucket's numbers stand in the row and in the states. Indices count runs of D numbers, or of D / 2."""

    bucket: Bucket
    gather: torch.Tensor
    """[all heads * n L]: from the row."""
    gather_swapped: torch.Tensor
    """[turned heads * n L * 2], of halves: the same with the halves of each head in the other order."""
    swap: torch.Tensor
    """[turned heads * n L * 2], of halves: the states with their halves in the other order."""
    back: torch.Tensor
    """[tokens * all heads]: from the states to the row."""
    outward: torch.Tensor
    """[tokens * H]: from the queries' states to their row."""
    inward: torch.Tensor
    """[H * n L]: the other way."""
    filling: torch.Tensor | None
    """Of the queries' states."""
    cos: torch.Tensor
    """[n L D]."""
    sin: torch.Tensor
    """[n L D], the first half of each D negative."""
    causal: torch.Tensor
    """[L, L], float32: 0 or -inf."""


Attended = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Queries, keys and values [H n, L, D] (keys and values of H_kv heads), and P where it is kept."""


def places_of(segments: Segments, heads: Heads, cos: torch.Tensor, sin: torch.Tensor) -> list[Places]:
    """One for each bucket. cos and sin [1, T, D], their halves alike."""
    return [_places(bucket, heads, cos[0], sin[0]) for bucket in segments.buckets]


def _places(bucket: Bucket, heads: Heads, cos: torch.Tensor, sin: torch.Tensor) -> Places:
    device, half = cos.device, heads.size // 2
    every = torch.arange(bucket.tokens, device=device)
    take = every if bucket.take is None else bucket.take
    back = every if bucket.back is None else bucket.back
    size = len(take)

    def heads_first(count: int, width: int) -> torch.Tensor:
        return torch.arange(count, device=device).unsqueeze(1) + take.unsqueeze(0) * width

    def tokens_first(count: int) -> torch.Tensor:
        return (back.unsqueeze(1) + torch.arange(count, device=device).unsqueeze(0) * size).reshape(-1)

    gather = heads_first(heads.all, heads.all)
    other = torch.tensor([1, 0], device=device)
    swapped = (gather[: heads.turned] * 2).unsqueeze(-1) + other
    swap = torch.arange(heads.turned * size, device=device).mul_(2).unsqueeze(-1) + other
    filling = None
    if bucket.filling is not None:
        filling = torch.arange(heads.queries, device=device).unsqueeze(1) * size + bucket.filling.unsqueeze(0)
    own = slice(bucket.start, bucket.start + bucket.tokens)
    signed = torch.cat((-sin[own, :half], sin[own, half:]), dim=1)
    later = torch.ones((bucket.length, bucket.length), dtype=torch.bool, device=device).triu_(1)
    causal = torch.zeros((bucket.length, bucket.length), device=device).masked_fill_(later, -torch.inf)
    return Places(
        bucket,
        gather.reshape(-1),
        swapped.reshape(-1),
        swap.reshape(-1),
        tokens_first(heads.all),
        tokens_first(heads.queries),
        heads_first(heads.queries, heads.queries).reshape(-1),
        None if filling is None else filling.reshape(-1),
        cos[own].index_select(0, take).reshape(-1),
        signed.index_select(0, take).reshape(-1),
        causal,
    )


def attend(row: torch.Tensor, places: Sequence[Places], heads: Heads) -> tuple[torch.Tensor, list[Attended]]:
    """row [T, all heads * D] -> [T, H D], and what the way back needs."""
    found, kept = [], []
    for place in places:
        bucket = place.bucket
        own = row.narrow(0, bucket.start, bucket.tokens)
        states = own.view(-1, heads.size).index_select(0, place.gather)
        swapped = own.view(-1, heads.size // 2).index_select(0, place.gather_swapped)
        _turn(states, swapped, place, heads, 1.0)
        query, key, value = _by_record(states, bucket, heads)
        shares = _shares(query, key, place, heads)
        out = torch.bmm(shares, _for_queries(value, bucket, heads)).view(-1, heads.size)
        found.append(out.index_select(0, place.outward).view(bucket.tokens, -1))
        kept.append((query, key, value, shares if bucket.length <= SHARES_KEPT else None))
    return found[0] if len(found) == 1 else torch.cat(found), kept


def attend_backward(
    upstream: torch.Tensor, kept: Sequence[Attended], places: Sequence[Places], heads: Heads
) -> torch.Tensor:
    """[T, H D] -> gradient for the row [T, all heads * D]."""
    found = []
    for place, (query, key, value, shares) in zip(places, kept, strict=True):
        bucket = place.bucket
        if shares is None:
            shares = _shares(query, key, place, heads)
        own = upstream.narrow(0, bucket.start, bucket.tokens).reshape(-1, heads.size)
        gradient = own.index_select(0, place.inward)
        if place.filling is not None:
            gradient.index_fill_(0, place.filling, 0)  # nothing reads what a filling position computes
        gradient = gradient.view(query.shape)
        states = gradient.new_empty((heads.all * bucket.records * bucket.length, heads.size))
        for_query, for_key, for_value = _by_record(states, bucket, heads)
        every_key, every_value = (_for_queries(one, bucket, heads) for one in (key, value))
        for_shares = torch.bmm(gradient, every_value.transpose(1, 2))
        for_scores = torch._softmax_backward_data(for_shares, shares, -1, shares.dtype).mul_(heads.scale)
        torch.bmm(for_scores, every_key, out=for_query)
        _onto_keys(for_scores, query, for_key, heads)
        _onto_keys(shares, gradient, for_value, heads)
        swapped = states[: heads.turned * bucket.records * bucket.length].view(-1, heads.size // 2)
        _turn(states, swapped.index_select(0, place.swap), place, heads, -1.0)
        found.append(states.index_select(0, place.back).view(bucket.tokens, -1))
    return found[0] if len(found) == 1 else torch.cat(found)


def _turn(states: torch.Tensor, swapped: torch.Tensor, place: Places, heads: Heads, sign: float) -> None:
    """The rotary embedding, or its inverse, in place on the heads of queries and keys."""
    turned = states.view(heads.all, -1)[: heads.turned]
    turned.mul_(place.cos).addcmul_(swapped.view(heads.turned, -1), place.sin, value=sign)


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


def _shares(query: torch.Tensor, key: torch.Tensor, place: Places, heads: Heads) -> torch.Tensor:
    """P in the type of the queries; the softmax is float32's."""
    scores = torch.bmm(query, _for_queries(key, place.bucket, heads).transpose(1, 2)).float()
    torch.add(place.causal, scores, alpha=heads.scale, out=scores)
    return torch.softmax(scores, -1).to(query.dtype)


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
