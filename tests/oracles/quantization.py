"""Block-wise quantization in float64, one weight at a time: what `kernels.quantize` must agree with."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["best_scale_error", "dequantize_block_by_block", "round_to_nearest"]


def _blocks(row: np.ndarray, size: int) -> list[list[float]]:
    values = [float(value) for value in row]
    values += [0.0] * (-len(values) % size)
    return [values[start : start + size] for start in range(0, len(values), size)]


def round_to_nearest(
    weights: np.ndarray, bits: int, size: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [n, b, g], scales [n, b] and zero points [n, b], unpacked."""
    codes, scales, zeros = [], [], []
    half, levels = 2 ** (bits - 1), 2**bits - 1
    for row in weights.astype(np.float64):
        for block in _blocks(row, size):
            if symmetric:
                peak = max(block, key=abs)
                scale, zero = peak / -half, half
            else:
                low, high = min(0.0, *block), max(0.0, *block)
                scale = (high - low) / levels
                zero = math.floor(0.5 - low / scale) if scale else 0
            inverse = 1 / scale if scale else 0.0
            codes.append([min(max(math.floor(value * inverse + zero + 0.5), 0), levels) for value in block])
            scales.append(scale)
            zeros.append(zero)
    n = len(weights)
    return np.array(codes).reshape(n, -1, size), np.array(scales).reshape(n, -1), np.array(zeros).reshape(n, -1)


def best_scale_error(block: np.ndarray, bits: int, steps: int = 2000) -> float:
    """Squared error of the best symmetric scale of a fine grid over one block."""
    half, levels = 2 ** (bits - 1), 2**bits - 1
    values = block.astype(np.float64)
    best = float(np.sum(values**2))
    peak = values[np.argmax(np.abs(values))]
    for factor in np.linspace(0.8, 1.25, steps):
        code = np.clip(np.floor(values * (-half * factor / peak) + half + 0.5), 0, levels) - half
        if np.any(code):
            best = min(best, float(np.sum((values - code * (values @ code) / (code @ code)) ** 2)))
    return best


def dequantize_block_by_block(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int, k: int
) -> np.ndarray:
    """The weights that MatMulNBits multiplies with, read from its packed layout byte by byte; float64 [n, k]."""
    n, _, width = codes.shape
    size = width * 8 // bits
    out = np.zeros((n, k))
    for row in range(n):
        for column in range(k):
            block, inside = divmod(column, size)
            byte = int(codes[row, block, inside * bits // 8])
            code = byte if bits == 8 else (byte >> (4 * (inside % 2))) & 15
            if zeros is None:
                zero = 2 ** (bits - 1)
            else:
                packed = int(zeros[row, block * bits // 8])
                zero = packed if bits == 8 else (packed >> (4 * (block % 2))) & 15
            out[row, column] = (code - zero) * float(scales[row, block])
    return out
