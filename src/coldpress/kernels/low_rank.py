"""W + B A in one pass over W, in float32: what a LoRA adapter adds to rows of a weight.

    W   rows of a weight [n, k], float32, float16 or bfloat16        B   [n, r] float32, already scaled
    W'  the sum [n, k], float32                                      A   [r, k] float32

A matrix product followed by a sum would write and read [n, k] three times more, which is what it costs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numba
import numba.extending
import numpy as np
import numpy.typing as npt

from coldpress.kernels.quantize import bit_patterns

__all__ = ["add_product", "bits_as_float"]

COLUMNS = 1024
"""Columns that are worked on at a time: eight rows of A and four of the sum fill 48 KiB."""

Floats = npt.NDArray[np.float32]

_COMPILING = threading.Lock()


def _rows(words: Any, shift: Any, b: Any, a: Any, out: Any) -> None:
    """Four rows of W and eight of A at a time: each number that is loaded then serves four or eight products."""
    n, k = out.shape
    rank, last = a.shape[0], n - 1
    spare = np.empty((4, COLUMNS), np.float32)
    for first in range(0, k, COLUMNS):
        width = min(COLUMNS, k - first)
        end = first + width
        for row in range(0, n, 4):
            rows = min(4, n - row)
            whole = rows == 4  # behind the last row it is taken again, and its sum dropped
            w0, w1 = words[row, first:end], words[min(row + 1, last), first:end]
            w2, w3 = words[min(row + 2, last), first:end], words[min(row + 3, last), first:end]
            x0 = out[row, first:end] if whole else spare[0, :width]
            x1 = out[row + 1, first:end] if whole else spare[1, :width]
            x2 = out[row + 2, first:end] if whole else spare[2, :width]
            x3 = out[row + 3, first:end] if whole else spare[3, :width]
            p0, p1, p2, p3 = b[row], b[min(row + 1, last)], b[min(row + 2, last)], b[min(row + 3, last)]
            j = 0
            while j + 8 <= rank:
                a0, a1, a2, a3 = a[j, first:end], a[j + 1, first:end], a[j + 2, first:end], a[j + 3, first:end]
                a4, a5, a6, a7 = a[j + 4, first:end], a[j + 5, first:end], a[j + 6, first:end], a[j + 7, first:end]
                c0, c1, c2, c3, c4, c5, c6, c7 = _eight(p0, j)
                d0, d1, d2, d3, d4, d5, d6, d7 = _eight(p1, j)
                e0, e1, e2, e3, e4, e5, e6, e7 = _eight(p2, j)
                f0, f1, f2, f3, f4, f5, f6, f7 = _eight(p3, j)
                if j == 0:  # the weights enter with the first eight: one pass less
                    for i in range(width):
                        s0, s1, s2, s3, s4, s5, s6, s7 = a0[i], a1[i], a2[i], a3[i], a4[i], a5[i], a6[i], a7[i]
                        t0 = c0 * s0 + c1 * s1 + c2 * s2 + c3 * s3 + c4 * s4 + c5 * s5 + c6 * s6 + c7 * s7
                        t1 = d0 * s0 + d1 * s1 + d2 * s2 + d3 * s3 + d4 * s4 + d5 * s5 + d6 * s6 + d7 * s7
                        t2 = e0 * s0 + e1 * s1 + e2 * s2 + e3 * s3 + e4 * s4 + e5 * s5 + e6 * s6 + e7 * s7
                        t3 = f0 * s0 + f1 * s1 + f2 * s2 + f3 * s3 + f4 * s4 + f5 * s5 + f6 * s6 + f7 * s7
                        x0[i], x1[i] = _as_float(w0[i], shift) + t0, _as_float(w1[i], shift) + t1
                        x2[i], x3[i] = _as_float(w2[i], shift) + t2, _as_float(w3[i], shift) + t3
                    j += 8
                    continue
                for i in range(width):
                    s0, s1, s2, s3, s4, s5, s6, s7 = a0[i], a1[i], a2[i], a3[i], a4[i], a5[i], a6[i], a7[i]
                    x0[i] += c0 * s0 + c1 * s1 + c2 * s2 + c3 * s3 + c4 * s4 + c5 * s5 + c6 * s6 + c7 * s7
                    x1[i] += d0 * s0 + d1 * s1 + d2 * s2 + d3 * s3 + d4 * s4 + d5 * s5 + d6 * s6 + d7 * s7
                    x2[i] += e0 * s0 + e1 * s1 + e2 * s2 + e3 * s3 + e4 * s4 + e5 * s5 + e6 * s6 + e7 * s7
                    x3[i] += f0 * s0 + f1 * s1 + f2 * s2 + f3 * s3 + f4 * s4 + f5 * s5 + f6 * s6 + f7 * s7
                j += 8
            if j == 0:
                for i in range(width):
                    x0[i], x1[i] = _as_float(w0[i], shift), _as_float(w1[i], shift)
                    x2[i], x3[i] = _as_float(w2[i], shift), _as_float(w3[i], shift)
            while j < rank:
                a0 = a[j, first:end]
                c0, d0, e0, f0 = p0[j], p1[j], p2[j], p3[j]
                for i in range(width):
                    x0[i] += c0 * a0[i]
                    x1[i] += d0 * a0[i]
                    x2[i] += e0 * a0[i]
                    x3[i] += f0 * a0[i]
                j += 1
            if not whole:
                out[row : row + rows, first:end] = spare[:rows, :width]


@numba.extending.intrinsic  # type: ignore[untyped-decorator]
def bits_as_float(typing: Any, bits: Any) -> Any:
    """A uint32 as the float32 of the same bits."""

    def make(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], context.get_value_type(numba.types.float32))

    return numba.types.float32(numba.types.uint32), make


def _as_float(word: Any, shift: Any) -> Any:
    return bits_as_float(np.uint32(np.uint32(word) << shift))


def _eight(x: Any, j: Any) -> Any:
    return x[j], x[j + 1], x[j + 2], x[j + 3], x[j + 4], x[j + 5], x[j + 6], x[j + 7]


_as_float, _eight = numba.njit(inline="always")(_as_float), numba.njit(inline="always")(_eight)


@functools.cache
def _compiled(dtype: str) -> Callable[..., None]:
    t = numba.types
    words = t.Array(getattr(t, dtype), 2, "C", readonly=True, aligned=False)
    constant = t.Array(t.float32, 2, "C", readonly=True)
    signature = t.void(words, t.uint32, constant, constant, t.float32[:, ::1])
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return numba.njit(signature, cache=True, **options)(_rows)  # type: ignore[no-any-return]
    except RuntimeError:  # no folder that Numba may write to: compile each time
        return numba.njit(signature, **options)(_rows)  # type: ignore[no-any-return]


def add_product(weights: npt.NDArray[Any], b: Floats, a: Floats) -> Floats:
    """W + B A, float32 [n, k], for W [n, k], B [n, r] and A [r, k]. Runs without the GIL, on one thread.

    Raises ValueError for shapes that do not fit.
    """
    n, k = weights.shape
    if b.shape[0] != n or a.shape[1] != k or b.shape[1] != a.shape[0]:
        raise ValueError(f"W {list(weights.shape)}, B {list(b.shape)} and A {list(a.shape)} do not fit together")
    patterns, shift = bit_patterns(weights)
    out = np.empty((n, k), np.float32)
    with _COMPILING:
        run = _compiled(patterns.dtype.name)
    b, a = np.ascontiguousarray(b, np.float32), np.ascontiguousarray(a, np.float32)
    run(patterns, shift, b, a, out)
    return out
