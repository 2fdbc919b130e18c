"""Half-quadratic quantization: zero points that are fitted to a heavy-tailed error, in the layout of `quantize`.

    w       weights of a block; s its scale, (max - min) / levels with zero in the range, as round-to-nearest takes it
    z       zero point, a float32; codes q = clamp(round(w/s + z)), w' = (q - z) s
    r       w/s - (q - z), the error in steps
    p       11/16, the norm that is made small; beta 10, growing by kappa 1.01 with each of at most 20 rounds

One round (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023, equations 3 to 6):
    e = sign(r) max(|r| - |r|^(p-1) / beta, 0)    the part of the error that is left to the outliers
    z = mean(q - (w/s - e))
Rounds end when the mean of |r| no longer falls, and the best z is kept; the first is that of round-to-nearest, so the
mean error is never larger than its.

Where this departs: their p is 0.7; 11/16 is made of square roots, which run eight at a time. They measure r in the
weights' own unit, so that beta means another thing for each matrix, and stop for a matrix as a whole; here r is in
steps and each block stops for itself, so that the result depends neither on the size of the weights nor on how rows
are cut into chunks. As theirs at 4 bits, the first z is rounded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from coldpress.kernels.quantize import (
    BLOCK_SIZES,
    COMPILING,
    FAST_MATH,
    NonFiniteWeightError,
    Quantized,
    bit_patterns,
    encode_block,
    load_block,
    lowest_highest,
)

__all__ = ["quantize_half_quadratic"]

BETA, KAPPA, ROUNDS = 10.0, 1.01, 20


def _round(x: Any, width: int, inverse: Any, zero: Any, top: Any, beta: Any) -> Any:
    """Sum of |r| under a zero point, and the zero point of the next round."""
    offset = zero + np.float32(0.5)
    error, moved = np.float32(0), np.float32(0)
    for i in range(width):
        v = x[i] * inverse
        c = np.float32(np.int32(max(min(v + offset, top), np.float32(0))))
        r = v - (c - zero)
        size = abs(r)
        error += size
        fourth = math.sqrt(math.sqrt(size))
        sixteenth = math.sqrt(math.sqrt(fourth))
        e = max(size - np.float32(1) / (fourth * sixteenth * beta), np.float32(0))  # size^(p-1), p = 11/16
        moved += c - v + (e if r > 0 else -e)
    return error, moved / np.float32(width)


_round = numba.njit(inline="always")(_round)


def _rows(bits_in: Any, shift: Any, k: int, bits: int, out: Any, scales: Any, zeros: Any) -> int:
    n, blocks = scales.shape
    size = out.shape[2] * 8 // bits
    words = np.empty(size, np.uint32)
    x = words.view(np.float32)
    codes = np.empty(size, np.uint8)
    levels = np.float32((1 << bits) - 1)
    top = levels + np.float32(0.5)  # truncation then yields at most the last code
    for row in range(n):
        for block in range(blocks):
            start = block * size
            width = min(size, k - start)
            peak = load_block(bits_in, row, start, width, shift, words)
            if peak >= np.uint32(0xFF000000):  # exponent all ones: NaN or infinity
                return row
            low, high = lowest_highest(x)
            span = high - low
            inverse, zero = np.float32(0), np.float32(0)
            if span >= np.float32(1e-30):  # otherwise 1/scale would overflow; such a block runs as zeros
                inverse = levels / span
                zero = np.float32(np.int32(np.float32(0.5) - low * inverse))
                best, trial, beta = np.float32(np.inf), zero, np.float32(BETA)
                for _ in range(ROUNDS):
                    error, moved = _round(x, width, inverse, trial, top, beta)
                    if error >= best:
                        break
                    best, zero, trial = error, trial, moved
                    beta *= np.float32(KAPPA)
                scales[row, block] = span / levels
            else:
                scales[row, block] = 0
            zeros[row, block] = zero
            encode_block(x, inverse, zero, top, codes)
            if bits == 4:
                for i in range(size // 2):
                    out[row, block, i] = np.uint8(codes[2 * i] | (codes[2 * i + 1] << np.uint8(4)))
            else:
                for i in range(size):
                    out[row, block, i] = codes[i]
    return -1


@functools.cache
def _compiled(dtype: str) -> Callable[..., int]:
    """The kernel for bit patterns of one width; see `quantize`."""
    t = numba.types
    words = t.Array(getattr(t, dtype), 2, "C", readonly=True, aligned=False)
    signature = t.int64(words, t.uint32, t.int64, t.int64, t.uint8[:, :, ::1], t.float32[:, ::1], t.float32[:, ::1])
    options = {"nogil": True, "error_model": "numpy", "fastmath": FAST_MATH}
    try:
        return numba.njit(signature, cache=True, **options)(_rows)  # type: ignore[no-any-return]
    except RuntimeError:  # no folder that Numba may write to: compile each time
        return numba.njit(signature, **options)(_rows)  # type: ignore[no-any-return]


def quantize_half_quadratic(weights: npt.NDArray[Any], *, bits: int, block_size: int) -> Quantized:
    """Quantize W [n, k] of float32, float16, bfloat16 (or its bits as uint16) or fp8 with float32 zero points [n, b].

    Peak memory is that of `quantize`. Runs without the GIL. Raises NonFiniteWeightError.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    n, k = weights.shape
    blocks = -(-k // block_size)
    patterns, shift = bit_patterns(weights)
    codes = np.empty((n, blocks, block_size * bits // 8), np.uint8)
    scales, zeros = np.empty((n, blocks), np.float32), np.empty((n, blocks), np.float32)
    with COMPILING:
        run = _compiled(patterns.dtype.name)
    bad = run(patterns, shift, k, bits, codes, scales, zeros)
    if bad >= 0:
        raise NonFiniteWeightError(bad)
    return Quantized(codes, scales, zeros)
