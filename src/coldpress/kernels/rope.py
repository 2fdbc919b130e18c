"""Rotary position embeddings: inverse frequencies and the cos/sin tables that ONNX Runtime's kernels read.

    d   rotary dimensions of a head, even, at most the head size
    f   inverse frequencies [d/2], radians per position; before scaling theta^(-2i/d)
    m   attention factor: cos and sin are multiplied by it
    tables  cos, sin [positions, d/2]; row p holds m*cos(p*f), m*sin(p*f)

Arithmetic is float32, in the order in which Transformers does it: at position 100,000 one rounding of f moves the angle
by 0.01, so "more exact" here would mean farther from the model as it was trained and is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ROPE_KINDS", "cos_sin", "inverse_frequencies"]

Floats = npt.NDArray[np.float32]


def _plain(dim: int, theta: float) -> Floats:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    result: Floats = np.float32(1.0) / np.power(np.float32(theta), exponents)
    return result


def _default(dim: int, theta: float) -> tuple[Floats, float]:
    return _plain(dim, theta), 1.0


def _linear(dim: int, theta: float, factor: float) -> tuple[Floats, float]:
    return _plain(dim, theta) / np.float32(factor), 1.0


def _dynamic(dim: int, theta: float, factor: float) -> tuple[Floats, float]:
    """NTK-aware scaling starts beyond the model's context length; within it the frequencies are plain."""
    return _plain(dim, theta), 1.0


def _llama3(
    dim: int, theta: float, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> tuple[Floats, float]:
    """Long waves are stretched by `factor`, short ones kept, those between are blended (Llama 3.1 model card)."""
    plain = _plain(dim, theta)
    waves = np.float32(2 * math.pi) / plain
    stretched = plain / np.float32(factor)
    blend = (np.float32(original_length) / waves - np.float32(low_freq_factor)) / np.float32(
        high_freq_factor - low_freq_factor
    )
    between = (1 - blend) * stretched + blend * plain
    result = np.where(waves > original_length / low_freq_factor, stretched, between)
    return np.where(waves < original_length / high_freq_factor, plain, result).astype(np.float32), 1.0


def _yarn(
    dim: int,
    theta: float,
    factor: float,
    original_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> tuple[Floats, float]:
    """YaRN (arXiv:2309.00071, section 3.2 "NTK-by-parts" and 3.4 for the attention factor)."""

    def turning(rotations: float) -> float:
        """Index of the frequency that makes so many rotations over the original context."""
        return dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    low, high = turning(beta_fast), turning(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1).astype(np.float32)
    plain = _plain(dim, theta)
    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = temperature(mscale or 1.0) / temperature(mscale_all_dim or 1.0) if both else temperature(1.0)
    return plain / np.float32(factor) * ramp + plain * (1 - ramp), attention_factor


def _longrope(
    dim: int,
    theta: float,
    factors: Sequence[float],
    factor: float,
    original_length: int,
    attention_factor: float | None = None,
) -> tuple[Floats, float]:
    """LongRoPE (arXiv:2402.13753): one divisor per frequency. `factor` is the ratio of new to original context."""
    if len(factors) != dim // 2:
        raise ValueError(
            f"longrope wants one factor per frequency: {dim // 2} for {dim} rotary dims, got {len(factors)}"
        )
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    scaled = np.asarray(factors, np.float32) * np.power(np.float32(theta), exponents)
    return np.float32(1.0) / scaled, attention_factor


ROPE_KINDS: Mapping[str, Callable[..., tuple[Floats, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def inverse_frequencies(kind: str, dim: int, theta: float, **parameters: Any) -> tuple[Floats, float]:
    """f [dim/2] and m for a kind of `ROPE_KINDS`; its parameters are those of the functions above."""
    if dim % 2:
        raise ValueError(f"rotary dimensions come in pairs, got {dim}")
    return ROPE_KINDS[kind](dim, theta, **parameters)


def cos_sin(frequencies: Floats, attention_factor: float, start: int, stop: int) -> tuple[Floats, Floats]:
    """Rows `start` to `stop` of the tables: float32 [stop - start, d/2] each."""
    angles = np.arange(start, stop, dtype=np.float32)[:, None] * frequencies[None, :].astype(np.float32)
    m = np.float32(attention_factor)
    return np.cos(angles) * m, np.sin(angles) * m
