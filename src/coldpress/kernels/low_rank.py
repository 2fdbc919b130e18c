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
import numpy as np
import numpy.typing as npt

from coldpress.kernels.quantize import bit_patterns

__all__ = ["add_product"]

COLUMNS = 512
"""Columns that are worked on at a time: four rows of A and of the sum stay in the first-level cache."""

Floats = npt.NDArray[np.float32]

_COMPILING = threading.Lock()


def _rows(words: Any, shift: Any, b: Any, a: Any, out: Any) -> None:
    """Four rows of W and four of A at a time: each number that is loaded then serves four products."""
    n, k = out.shape
    rank, last = a.shape[0], n - 1
    sums = np.empty((4, COLUMNS), np.float32)
    bits = sums.view(np.uint32)
    x0, x1, x2, x3 = sums[0], sums[1], sums[2], sums[3]
    for first in range(0, k, COLUMNS):
        width = min(COLUMNS, k - first)
        end = first + width
        for row in range(0, n, 4):
            rows = min(4, n - row)
            for p in range(rows):
                w, x = words[row + p, first:end], bits[p]
                for i in range(width):
                    x[i] = np.uint32(np.uint32(w[i]) << shift)
            # Behind the last row it is taken again, and its sum dropped.
            r1, r2, r3 = min(row + 1, last), min(row + 2, last), min(row + 3, last)
            j = 0
            while j + 4 <= rank:
                a0, a1, a2, a3 = a[j, first:end], a[j + 1, first:end], a[j + 2, first:end], a[j + 3, first:end]
                b00, b01, b02, b03 = b[row, j], b[row, j + 1], b[row, j + 2], b[row, j + 3]
                b10, b11, b12, b13 = b[r1, j], b[r1, j + 1], b[r1, j + 2], b[r1, j + 3]
                b20, b21, b22, b23 = b[r2, j], b[r2, j + 1], b[r2, j + 2], b[r2, j + 3]
                b30, b31, b32, b33 = b[r3, j], b[r3, j + 1], b[r3, j + 2], b[r3, j + 3]
                for i in range(width):
                    s0, s1, s2, s3 = a0[i], a1[i], a2[i], a3[i]
                    x0[i] += b00 * s0 + b01 * s1 + b02 * s2 + b03 * s3
                    x1[i] += b10 * s0 + b11 * s1 + b12 * s2 + b13 * s3
                    x2[i] += b20 * s0 + b21 * s1 + b22 * s2 + b23 * s3
                    x3[i] += b30 * s0 + b31 * s1 + b32 * s2 + b33 * s3
                j += 4
            while j < rank:
                a0 = a[j, first:end]
                b00, b10, b20, b30 = b[row, j], b[r1, j], b[r2, j], b[r3, j]
                for i in range(width):
                    x0[i] += b00 * a0[i]
                    x1[i] += b10 * a0[i]
                    x2[i] += b20 * a0[i]
                    x3[i] += b30 * a0[i]
                j += 1
            for p in range(rows):
                whole, x = out[row + p, first:end], sums[p]
                for i in range(width):
                    whole[i] = x[i]


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
    run(patterns, shift, np.ascontiguousarray(b, np.float32), np.ascontiguousarray(a, np.float32), out)
    return out
