"""Half-quadratic zero points in float64, one weight at a time: what `kernels.hqq` must agree with."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["half_quadratic"]


def _codes(values: list[float], zero: float, levels: int) -> list[int]:
    return [min(max(math.floor(value + zero + 0.5), 0), levels) for value in values]


def _zero_of(values: list[float], levels: int) -> float:
    """Of a block whose values are in steps."""
    zero = float(math.floor(0.5 - min(0.0, *values)))
    best, kept, beta, p = math.inf, zero, 10.0, 11 / 16
    for _ in range(20):
        errors = [v - (c - zero) for v, c in zip(values, _codes(values, zero, levels), strict=True)]
        mean = sum(map(abs, errors)) / len(errors)
        if mean >= best:
            break
        best, kept = mean, zero
        left = [math.copysign(max(abs(e) - (abs(e) ** (p - 1)) / beta, 0.0), e) if e else 0.0 for e in errors]
        moved = [
            c - (v - e) for c, v, e in zip(_codes(values, zero, levels), values, left, strict=True)
        ]  # what z would make each entry exact, but for what is left to the outliers
        zero = sum(moved) / len(moved)
        beta *= 1.01
    return kept


def half_quadratic(weights: np.ndarray, bits: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [n, k], scales [n, b] and zero points [n, b]."""
    levels = 2**bits - 1
    codes, scales, zeros = [], [], []
    for row in weights.astype(np.float64):
        blocks = [row[start : start + size].tolist() for start in range(0, len(row), size)]
        steps = [(max(0.0, *block) - min(0.0, *block)) / levels for block in blocks]
        found = [_zero_of([value / step for value in block], levels) for block, step in zip(blocks, steps, strict=True)]
        scales.append(steps)
        zeros.append(found)
        codes.append(
            [
                code
                for block, step, zero in zip(blocks, steps, found, strict=True)
                for code in _codes([value / step for value in block], zero, levels)
            ]
        )
    return np.array(codes), np.array(scales), np.array(zeros)
