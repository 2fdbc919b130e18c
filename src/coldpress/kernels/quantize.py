"""Block-wise round-to-nearest quantization of a weight matrix, in the layout of ONNX Runtime's MatMulNBits.

    W       weights [n, k], row major; y = x W^T
    g       block size: weights of one row that share a scale; 16, 32, 64, 128 or 256
    b       blocks of a row, ceil(k/g); the last is filled up with zeros
    codes   uint8 [n, b, g*bits/8]; 4 bits: two codes a byte, the even column in the low nibble
    scales  float32 [n, b]
    zeros   uint8 [n, ceil(b*bits/8)], packed like codes along the blocks; absent means 2^(bits-1) everywhere
    w'      (code - zero) * scale, the weight that runs

Symmetric scales are w_peak / -2^(bits-1), w_peak the entry of greatest magnitude with its sign: so all 2^bits codes are
used and the peak is exact (as llama.cpp's Q4_0 and ONNX Runtime's own quantizer do it). Asymmetric ones span the
block's range, widened to hold zero. A block whose span is below 1e-30 becomes zeros. With `candidates` > 1 the scale is
searched: each candidate's codes get the least-squares scale sum(wc)/sum(cc), c = code - zero, and the one with the
smallest squared error wins.

Layout: com.microsoft.MatMulNBits in onnxruntime/docs/ContribOperators.md.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

__all__ = [
    "BLOCK_SIZES",
    "COMPILING",
    "FAST_MATH",
    "NonFiniteWeightError",
    "Quantized",
    "bit_patterns",
    "dequantize",
    "encode_block",
    "load_block",
    "lowest_highest",
    "quantize",
    "quantize_rows",
    "unpack",
]

BLOCK_SIZES = (16, 32, 64, 128, 256)

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class NonFiniteWeightError(ValueError):
    """A weight is NaN or infinite. `row` is the first row that has one."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} holds NaN or infinity")
        self.row = row


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix; see the head of this module."""

    codes: Bytes
    scales: Floats
    zeros: Bytes | Floats | None
    """Floats [n, b], not packed, are those of `kernels.hqq`."""


FAST_MATH = {"nnan", "nsz", "reassoc", "contract"}
"""Sums may be reordered and fused. Blocks with NaN or infinity are sorted out on their bits before any arithmetic."""


COMPILING = threading.Lock()
"""Two threads that need the same machine code must not both make it."""


def load_block(bits_in: Any, row: int, start: int, width: int, shift: Any, words: Any) -> Any:
    """One block as float32 bit patterns into `words`; returns magnitude (31 bits) and sign (lowest bit) of its peak."""
    peak = np.uint32(0)
    for i in range(width):
        word = np.uint32(np.uint32(bits_in[row, start + i]) << shift)  # Numba widens every shift to 64 bits
        words[i] = word
        peak = max(peak, np.uint32(np.uint32(word << np.uint32(1)) | np.uint32(word >> np.uint32(31))))
    for i in range(width, words.size):
        words[i] = np.uint32(0)
    return peak


def lowest_highest(x: Any) -> Any:
    low, high = np.float32(0), np.float32(0)
    for i in range(x.size):
        low, high = min(low, x[i]), max(high, x[i])
    return low, high


def encode_block(x: Any, inverse: Any, zero: Any, top: Any, codes: Any) -> None:
    offset = zero + np.float32(0.5)
    for i in range(x.size):
        codes[i] = np.uint8(np.int32(max(min(x[i] * inverse + offset, top), np.float32(0))))


def _fit(x: Any, inverse: Any, zero: Any, top: Any) -> Any:
    """Least-squares scale for the codes of a scale, and by how much it lowers the squared error below sum(ww)."""
    offset = zero + np.float32(0.5)
    cross, square = np.float32(0), np.float32(0)
    for i in range(x.size):
        c = np.float32(np.int32(max(min(x[i] * inverse + offset, top), np.float32(0)))) - zero
        cross += x[i] * c
        square += c * c
    if square == 0:
        return np.float32(0), np.float32(0)
    return cross / square, cross * cross / square


load_block, lowest_highest, encode_block, _fit = (
    numba.njit(inline="always")(helper) for helper in (load_block, lowest_highest, encode_block, _fit)
)


def _make_rows(symmetric: bool) -> Callable[..., int]:
    """The loop over rows. `symmetric` is a constant of the machine code: both forms in one run at a quarter of it."""

    def rows(bits_in: Any, shift: Any, k: int, bits: int, candidates: int, out: Any, scales: Any, zeros: Any) -> int:
        n, blocks = scales.shape
        size = out.shape[2] * 8 // bits
        words, spare = np.empty(size, np.uint32), np.empty(1, np.uint32)
        x = words.view(np.float32)
        codes = np.empty(size, np.uint8)
        pairs = codes.view(np.uint16)
        half, levels = np.float32(1 << (bits - 1)), np.float32((1 << bits) - 1)
        top = levels + np.float32(0.5)  # truncation then yields at most the last code
        for row in range(n):
            for block in range(blocks):
                start = block * size
                peak = load_block(bits_in, row, start, min(size, k - start), shift, words)
                if peak >= np.uint32(0xFF000000):  # exponent all ones: NaN or infinity
                    return row
                low = np.float32(0)
                if symmetric:
                    spare[0] = np.uint32(peak >> np.uint32(1))
                    span = spare.view(np.float32)[0]
                    span = span if peak & np.uint32(1) else -span
                    steps, zero = half, half
                else:
                    low, high = lowest_highest(x)
                    span, steps = high - low, levels
                if abs(span) < np.float32(1e-30):  # 1/scale would overflow; such a block runs as zeros
                    span = np.float32(0)
                inverse = steps / span if span != 0 else np.float32(0)
                scale = span / steps
                if not symmetric:
                    zero = np.float32(np.int32(np.float32(0.5) - low * inverse))
                if candidates > 1 and span != 0:
                    best = np.float32(-1)
                    for t in range(candidates):
                        # The grid of llama.cpp: levels moved by up to +-0.9 in even steps.
                        move = np.float32(-0.9) + np.float32(1.8) * np.float32(t) / np.float32(candidates - 1)
                        trial, trial_zero = (steps + move) / span, zero
                        if not symmetric:
                            trial_zero = np.float32(np.int32(min(np.float32(0.5) - low * trial, top)))
                        fitted, gain = _fit(x, trial, trial_zero, top)
                        if gain > best:
                            best, inverse, zero, scale = gain, trial, trial_zero, fitted
                encode_block(x, inverse, zero, top, codes)
                scales[row, block] = scale
                if bits == 4:
                    for i in range(size // 2):
                        pair = pairs[i]
                        out[row, block, i] = np.uint8(pair | (pair >> np.uint16(4)))
                else:
                    for i in range(size):
                        out[row, block, i] = codes[i]
                if not symmetric:
                    place = block * bits // 8
                    high_nibble = np.uint8(4) if bits == 4 and block % 2 == 1 else np.uint8(0)
                    zeros[row, place] = np.uint8(zeros[row, place] | np.uint8(np.uint8(zero) << high_nibble))
        return -1

    return rows


@functools.cache
def _compiled(dtype: str, symmetric: bool) -> Callable[..., int]:
    """The kernel for bit patterns of one width; the others are not compiled.

    The input is declared read-only and unaligned, which any array may be passed as, so that memory maps need no second
    copy of the machine code.
    """
    t = numba.types
    words = t.Array(getattr(t, dtype), 2, "C", readonly=True, aligned=False)
    signature = t.int64(
        words, t.uint32, t.int64, t.int64, t.int64, t.uint8[:, :, ::1], t.float32[:, ::1], t.uint8[:, ::1]
    )
    options = {"nogil": True, "error_model": "numpy", "fastmath": FAST_MATH}
    try:
        return numba.njit(signature, cache=True, **options)(_make_rows(symmetric))  # type: ignore[no-any-return]
    except RuntimeError:  # no folder that Numba may write to: compile each time
        return numba.njit(signature, **options)(_make_rows(symmetric))  # type: ignore[no-any-return]


def quantize(
    weights: npt.NDArray[Any], *, bits: int, block_size: int, symmetric: bool = True, candidates: int = 1
) -> Quantized:
    """Quantize W [n, k] of float32, float16, bfloat16 (ml_dtypes, or its bits as uint16) or fp8.

    `candidates`: scales tried for a block; 1 takes the plain one. Peak memory is the result, and for types other than
    float32 and bfloat16 a float32 copy. Runs without the GIL. Raises NonFiniteWeightError.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    return _in_blocks(weights, bits, block_size, symmetric, candidates)


def quantize_rows(weights: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int8], Floats]:
    """W [n, k] at 8 bits with one scale for each row: signed codes [n, k] and scales [n]; W' = code * scale.

    As a symmetric block as long as the row: the scale is w_peak / -128. Raises NonFiniteWeightError.
    """
    k = weights.shape[1]
    whole = _in_blocks(weights, 8, k + k % 2, True, 1)  # the kernel packs codes in pairs
    codes = whole.codes[:, 0]
    codes ^= np.uint8(128)  # code - 128, as a signed byte
    return codes.view(np.int8)[:, :k], whole.scales[:, 0]


def _in_blocks(weights: npt.NDArray[Any], bits: int, block_size: int, symmetric: bool, candidates: int) -> Quantized:
    n, k = weights.shape
    blocks = -(-k // block_size)
    patterns, shift = bit_patterns(weights)
    codes = np.empty((n, blocks, block_size * bits // 8), np.uint8)
    scales = np.empty((n, blocks), np.float32)
    zeros = np.zeros((n, 0 if symmetric else -(-blocks * bits // 8)), np.uint8)
    with COMPILING:
        run = _compiled(patterns.dtype.name, symmetric)
    bad = run(patterns, shift, k, bits, candidates, codes, scales, zeros)
    if bad >= 0:
        raise NonFiniteWeightError(bad)
    return Quantized(codes, scales, None if symmetric else zeros)


def bit_patterns(weights: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], np.uint32]:
    """Words, and by how many bits each must be shifted up to be a float32."""
    if weights.dtype.name == "bfloat16" or weights.dtype == np.uint16:
        return np.ascontiguousarray(weights).view(np.uint16), np.uint32(16)
    return np.ascontiguousarray(weights, dtype=np.float32).view(np.uint32), np.uint32(0)


def unpack(packed: Bytes, bits: int) -> Bytes:
    """Codes of the last axis, one a byte."""
    if bits == 8:
        return packed
    pairs = np.stack([packed & 0x0F, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)


def dequantize(quantized: Quantized, *, bits: int, k: int) -> Floats:
    """The weights that run, float32 [n, k]."""
    n, blocks = quantized.scales.shape
    codes = unpack(quantized.codes, bits).astype(np.float32)
    if quantized.zeros is None:
        zeros: npt.NDArray[Any] = np.full((n, blocks), 1 << (bits - 1), np.float32)
    elif quantized.zeros.dtype == np.float32:
        zeros = quantized.zeros
    else:
        zeros = unpack(quantized.zeros, bits)[:, :blocks].astype(np.float32)  # type: ignore[arg-type]
    weights = (codes - zeros[:, :, None]) * quantized.scales[:, :, None]
    result: Floats = weights.reshape(n, -1)[:, :k]
    return result
