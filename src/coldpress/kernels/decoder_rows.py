"""What a decoder layer does between its matrix products, forward and backward, one pass over the numbers each.

    norm            y = w round(q x), q = 1 / sqrt(mean(x^2) + eps)         Zhang and Sennrich 2019, equation 4
    gate            y = silu(g) u of a row [g | u]                          Shazeer 2020, equation 6
    dropped         y = m x, m a dropout's mask, not divided by 1 - p       Srivastava et al. 2014
    softmax         P = softmax(s S) over the columns up to the row's own   causal attention
    spread, join    a row's heads apart, turned by their position, and back Su et al. 2021, equation 34
    narrow, widen   s x of a trained matrix in the type of the products, and back

A mask is not stored: whether a value stays is a hash of its place and of two seeds, which the way back asks again (the
finalizer of Appleby's MurmurHash3, with the seeds added on the way). Arithmetic is float32's, results are rounded once
to the type of the numbers. Each kernel works on the rows from `first` to before `last` of its outermost dimension,
without the GIL, so that threads can share one call.

Kernels are C functions on addresses: a small layer calls many of them for little work each, and Numba's own way of
taking an array, with torch's of giving it, is a large part of that.

    T   tokens      d   width      n   records of one length L      H   heads of D numbers, the first R of them turned
    numbers are float32, or bfloat16 as uint16 patterns; all arrays are contiguous
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numba.extending
import numpy as np

from coldpress.kernels.low_rank import bits_as_float

__all__ = ["DecoderRows", "decoder_rows"]

Kernel = Callable[..., None]


@dataclass(frozen=True)
class DecoderRows:
    """The kernels for one type of number, each called with `first`, `last`, then sizes, then addresses and numbers."""

    norm: Kernel
    """d; x [T, d], w [d], eps, y [T, d], q [T] float32."""
    norm_backward: Kernel
    """d; dy [T, d], x [T, d], w [d], q [T], dx [T, d]: the gradient is added to what stands in dx."""
    gate: Kernel
    """d; [g | u] [T, 2 d], y [T, d]."""
    gate_backward: Kernel
    """d; dy [T, d], [g | u] [T, 2 d], their gradient [T, 2 d]."""
    dropped: Kernel
    """d; x [T, d], seed, seed, limit, y [T, d]: hashes below the limit (of 2^32) drop their value."""
    add_dropped: Kernel
    """d; x [T, d], seed, seed, limit, y [T, d]: m x is added to y."""
    softmax: Kernel
    """L; S [H n, L, L] becomes P in place, s."""
    softmax_backward: Kernel
    """L; dP [H n, L, L] becomes s dS in place, P, s."""
    spread: Kernel
    """H, D, R, n L; row [T, H D], take [n L] int32 (below 0: no token), cos, sin [T, D], states [H, n L, D]."""
    join: Kernel
    """H, D, R, n L, whether to add to what stands in the row; states [H, n L, D], take, cos, sin, row [T, H D]: turned
    the other way round."""
    narrow: Kernel
    """x [n] float32, s, y [n]: s x in the type of the others; over numbers."""
    widen: Kernel
    """x [n], s, y [n] float32: the other way; over numbers."""
    keep: Any
    """What owns the machine code."""


# -- numbers -----------------------------------------------------------------------------------------------------------


@numba.extending.intrinsic  # type: ignore[untyped-decorator]
def _load(typing: Any, word: Any) -> Any:
    """The number of an array's word, float32."""

    def make(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        real, bits = (context.get_value_type(one) for one in (numba.types.float32, numba.types.uint32))
        if word == numba.types.float32:
            return values[0]
        return builder.bitcast(builder.shl(builder.zext(values[0], bits), bits(16)), real)

    return numba.types.float32(word), make


@numba.extending.intrinsic  # type: ignore[untyped-decorator]
def _store(typing: Any, number: Any, like: Any) -> Any:
    """The word of a number, rounded to the nearest (ties to even) where it is of the type of `like`, bfloat16."""

    def make(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if like == numba.types.float32:
            return values[0]
        whole, short = (context.get_value_type(one) for one in (numba.types.uint32, numba.types.uint16))
        bits = builder.bitcast(values[0], whole)
        odd = builder.and_(builder.lshr(bits, whole(16)), whole(1))
        return builder.trunc(builder.lshr(builder.add(bits, builder.add(odd, whole(0x7FFF))), whole(16)), short)

    return like(numba.types.float32, like), make


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _exp(x: Any) -> Any:
    """e^x to 1e-6 of itself; beyond 2^-126 and 2^126 it stays there. 2^n times the series of 2^r, |r| <= 1/2."""
    y = min(max(x * np.float32(1.4426950408889634), np.float32(-126)), np.float32(126))
    n = np.int32(y + (np.float32(0.5) if y >= 0 else np.float32(-0.5)))
    r = y - np.float32(n)
    p = np.float32(1.5403530e-4)  # ln(2)^k / k!, from the sixth
    p = p * r + np.float32(1.3333558e-3)
    p = p * r + np.float32(9.6181291e-3)
    p = p * r + np.float32(5.5504109e-2)
    p = p * r + np.float32(2.4022651e-1)
    p = p * r + np.float32(6.9314718e-1)
    p = p * r + np.float32(1)
    return p * bits_as_float(np.uint32(np.uint32(n + np.int32(127)) << np.uint32(23)))


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _stays(place: Any, one: Any, other: Any, limit: Any) -> Any:
    h = np.uint32(np.uint32(place) * np.uint32(0x9E3779B9) + one)
    h = np.uint32(h ^ np.uint32(h >> np.uint32(16)))
    h = np.uint32(h * np.uint32(0x85EBCA6B) + other)
    h = np.uint32(h ^ np.uint32(h >> np.uint32(13)))
    h = np.uint32(h * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ np.uint32(h >> np.uint32(16))) >= limit


# -- kernels -----------------------------------------------------------------------------------------------------------


def _norm(first: Any, last: Any, d: Any, x_at: Any, w_at: Any, eps: Any, y_at: Any, q_at: Any) -> None:
    x, w = numba.carray(x_at, (last, d)), numba.carray(w_at, d)
    y, q = numba.carray(y_at, (last, d)), numba.carray(q_at, last)
    for row in range(first, last):
        own, out, total = x[row], y[row], np.float32(0)
        for i in range(d):
            total += _load(own[i]) * _load(own[i])
        inverse = np.float32(1) / np.sqrt(total / np.float32(d) + eps)
        q[row] = inverse
        for i in range(d):
            unit = _load(_store(_load(own[i]) * inverse, own[i]))
            out[i] = _store(unit * _load(w[i]), own[i])


def _norm_backward(first: Any, last: Any, d: Any, dy_at: Any, x_at: Any, w_at: Any, q_at: Any, dx_at: Any) -> None:
    dy, x, w = numba.carray(dy_at, (last, d)), numba.carray(x_at, (last, d)), numba.carray(w_at, d)
    q, dx = numba.carray(q_at, last), numba.carray(dx_at, (last, d))
    for row in range(first, last):
        upstream, own, out, inverse, total = dy[row], x[row], dx[row], q[row], np.float32(0)
        for i in range(d):
            total += _load(upstream[i]) * _load(w[i]) * _load(own[i])
        mean = total * inverse * inverse / np.float32(d)
        for i in range(d):
            gradient = (_load(upstream[i]) * _load(w[i]) - _load(own[i]) * mean) * inverse
            out[i] = _store(_load(out[i]) + gradient, own[i])


def _gate(first: Any, last: Any, d: Any, both_at: Any, y_at: Any) -> None:
    both, y = numba.carray(both_at, (last, 2 * d)), numba.carray(y_at, (last, d))
    for row in range(first, last):
        gate, up, out = both[row, :d], both[row, d:], y[row]
        for i in range(d):
            g = _load(gate[i])
            out[i] = _store(g / (np.float32(1) + _exp(-g)) * _load(up[i]), gate[i])


def _gate_backward(first: Any, last: Any, d: Any, dy_at: Any, both_at: Any, gradient_at: Any) -> None:
    dy, both = numba.carray(dy_at, (last, d)), numba.carray(both_at, (last, 2 * d))
    gradient, shares = numba.carray(gradient_at, (last, 2 * d)), np.empty(d, np.float32)
    for row in range(first, last):
        gate, up, upstream = both[row, :d], both[row, d:], dy[row]
        for_gate, for_up = gradient[row, :d], gradient[row, d:]
        for i in range(d):
            shares[i] = np.float32(1) / (np.float32(1) + _exp(-_load(gate[i])))
        for i in range(d):
            slope = shares[i] * (np.float32(1) + _load(gate[i]) * (np.float32(1) - shares[i]))
            for_gate[i] = _store(_load(upstream[i]) * _load(up[i]) * slope, gate[i])
        for i in range(d):
            for_up[i] = _store(_load(upstream[i]) * _load(gate[i]) * shares[i], gate[i])


def _dropped(first: Any, last: Any, d: Any, x_at: Any, one: Any, other: Any, limit: Any, y_at: Any) -> None:
    x, y = numba.carray(x_at, (last, d)), numba.carray(y_at, (last, d))
    for row in range(first, last):
        own, out, start = x[row], y[row], np.uint32(row * d)
        for i in range(d):
            stays = _stays(start + np.uint32(i), one, other, limit)
            out[i] = own[i] if stays else _store(np.float32(0), own[i])


def _add_dropped(first: Any, last: Any, d: Any, x_at: Any, one: Any, other: Any, limit: Any, y_at: Any) -> None:
    x, y = numba.carray(x_at, (last, d)), numba.carray(y_at, (last, d))
    for row in range(first, last):
        own, out, start = x[row], y[row], np.uint32(row * d)
        for i in range(d):
            part = _load(own[i]) if _stays(start + np.uint32(i), one, other, limit) else np.float32(0)
            out[i] = _store(_load(out[i]) + part, own[i])


def _softmax(first: Any, last: Any, length: Any, scores_at: Any, scale: Any) -> None:
    scores, powers = numba.carray(scores_at, (last, length, length)), np.empty(length, np.float32)
    for matrix in range(first, last):
        for row in range(length):
            own, end = scores[matrix, row], row + 1
            highest, total = _load(own[0]), np.float32(0)
            for i in range(end):
                highest = max(highest, _load(own[i]))
            for i in range(end):
                powers[i] = _exp((_load(own[i]) - highest) * scale)
            for i in range(end):
                total += powers[i]
            inverse = np.float32(1) / total
            for i in range(end):
                own[i] = _store(powers[i] * inverse, own[i])
            for i in range(end, length):
                own[i] = _store(np.float32(0), own[i])


def _softmax_backward(first: Any, last: Any, length: Any, gradient_at: Any, shares_at: Any, scale: Any) -> None:
    gradient = numba.carray(gradient_at, (last, length, length))
    shares = numba.carray(shares_at, (last, length, length))
    for matrix in range(first, last):
        for row in range(length):
            own, share, end, total = gradient[matrix, row], shares[matrix, row], row + 1, np.float32(0)
            for i in range(end):
                total += _load(own[i]) * _load(share[i])
            for i in range(end):
                own[i] = _store((_load(own[i]) - total) * _load(share[i]) * scale, own[i])
            for i in range(end, length):
                own[i] = _store(np.float32(0), own[i])


def _spread(
    first: Any, last: Any, heads: Any, size: Any, turned: Any, places: Any,
    row_at: Any, take_at: Any, cos_at: Any, sin_at: Any, states_at: Any,
) -> None:  # fmt: skip
    take, states = numba.carray(take_at, places), numba.carray(states_at, (heads, places, size))
    half = size // 2
    for place in range(first, last):
        token = take[place]
        if token < 0:
            for head in range(heads):
                out = states[head, place]
                for i in range(size):
                    out[i] = _store(np.float32(0), out[i])
            continue
        row = numba.carray(row_at, (token + 1, heads, size))[token]
        cos, sin = (numba.carray(cos_at, (token + 1, size))[token], numba.carray(sin_at, (token + 1, size))[token])
        for head in range(heads):
            own, out = row[head], states[head, place]
            if head >= turned:
                for i in range(size):
                    out[i] = own[i]
                continue
            _turn(own[:half], own[half:], cos, sin, np.float32(1), 0, out[:half], out[half:])


def _join(
    first: Any, last: Any, heads: Any, size: Any, turned: Any, places: Any, adding: Any,
    states_at: Any, take_at: Any, cos_at: Any, sin_at: Any, row_at: Any,
) -> None:  # fmt: skip
    take, states = numba.carray(take_at, places), numba.carray(states_at, (heads, places, size))
    half = size // 2
    for place in range(first, last):
        token = take[place]
        if token < 0:
            continue
        row = numba.carray(row_at, (token + 1, heads, size))[token]
        cos, sin = (numba.carray(cos_at, (token + 1, size))[token], numba.carray(sin_at, (token + 1, size))[token])
        for head in range(heads):
            own, out = states[head, place], row[head]
            if head >= turned:
                for i in range(size):
                    before = _load(out[i]) if adding else np.float32(0)
                    out[i] = _store(_load(own[i]) + before, own[i])
                continue
            _turn(own[:half], own[half:], cos, sin, np.float32(-1), adding, out[:half], out[half:])


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _turn(a: Any, b: Any, cos: Any, sin: Any, sign: Any, adding: Any, out_a: Any, out_b: Any) -> None:
    for i in range(a.size):
        before = _load(out_a[i]) if adding else np.float32(0)
        out_a[i] = _store(_load(a[i]) * _load(cos[i]) - _load(b[i]) * _load(sin[i]) * sign + before, a[i])
    for i in range(a.size):
        before = _load(out_b[i]) if adding else np.float32(0)
        out_b[i] = _store(_load(b[i]) * _load(cos[i]) + _load(a[i]) * _load(sin[i]) * sign + before, a[i])


def _narrow(first: Any, last: Any, x_at: Any, scale: Any, y_at: Any) -> None:
    x, y = numba.carray(x_at, last)[first:], numba.carray(y_at, last)[first:]
    for i in range(x.size):
        y[i] = _store(x[i] * scale, y[i])


def _widen(first: Any, last: Any, x_at: Any, scale: Any, y_at: Any) -> None:
    x, y = numba.carray(x_at, last)[first:], numba.carray(y_at, last)[first:]
    for i in range(x.size):
        y[i] = _load(x[i]) * scale


# -- machine code ------------------------------------------------------------------------------------------------------

_C_TYPES = {"int64": ctypes.c_int64, "uint32": ctypes.c_uint32, "float32": ctypes.c_float}


@functools.cache
def decoder_rows(dtype: str) -> DecoderRows:
    """The kernels for "float32" or "bfloat16": compiled at first use, then read from Numba's cache."""
    t, owners = numba.types, []
    word: Any = {"bfloat16": t.uint16, "float32": t.float32}[dtype]
    numbers, reals, places = t.CPointer(word), t.CPointer(t.float32), t.CPointer(t.int32)
    size, whole, real = t.int64, t.uint32, t.float32

    def compiled(kernel: Kernel, *parts: Any) -> Kernel:
        given = (t.int64, t.int64, *parts)
        # Sums may be reordered, so that they run in vector registers.
        options = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
        try:
            made = numba.cfunc(t.void(*given), cache=True, **options)(kernel)
        except RuntimeError:  # no folder that Numba may write to: compile each time
            made = numba.cfunc(t.void(*given), **options)(kernel)
        owners.append(made)
        c_types: list[Any] = [_C_TYPES.get(str(one), ctypes.c_void_p) for one in given]
        return ctypes.CFUNCTYPE(None, *c_types)(made.address)

    return DecoderRows(
        norm=compiled(_norm, size, numbers, numbers, real, numbers, reals),
        norm_backward=compiled(_norm_backward, size, numbers, numbers, numbers, reals, numbers),
        gate=compiled(_gate, size, numbers, numbers),
        gate_backward=compiled(_gate_backward, size, numbers, numbers, numbers),
        dropped=compiled(_dropped, size, numbers, whole, whole, whole, numbers),
        add_dropped=compiled(_add_dropped, size, numbers, whole, whole, whole, numbers),
        softmax=compiled(_softmax, size, numbers, real),
        softmax_backward=compiled(_softmax_backward, size, numbers, numbers, real),
        spread=compiled(_spread, size, size, size, size, numbers, places, numbers, numbers, numbers),
        join=compiled(_join, size, size, size, size, size, numbers, places, numbers, numbers, numbers),
        narrow=compiled(_narrow, reals, real, numbers),
        widen=compiled(_widen, numbers, real, reals),
        keep=owners,
    )
