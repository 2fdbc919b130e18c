"""Rotary frequencies in float64 with plain Python, straight from the papers' formulas."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["frequencies"]


def frequencies(kind: str, dim: int, theta: float, p: dict[str, Any]) -> tuple[list[float], float]:
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    scale = 1.0
    if kind == "linear":
        plain = [f / p["factor"] for f in plain]
    if kind == "llama3":
        plain = [_llama3(f, p) for f in plain]
    if kind == "longrope":
        plain = [f / factor for f, factor in zip(plain, p["factors"], strict=True)]
        if p["factor"] > 1:
            scale = math.sqrt(1 + math.log(p["factor"]) / math.log(p["original_length"]))
    if kind == "yarn":
        plain = _yarn(plain, dim, theta, p)
        scale = 0.1 * math.log(p["factor"]) + 1
    return plain, p.get("attention_factor", scale)


def _llama3(f: float, p: dict[str, Any]) -> float:
    turns = p["original_length"] * f / (2 * math.pi)
    if turns > p["high_freq_factor"]:
        return f
    if turns < p["low_freq_factor"]:
        return f / p["factor"]
    blend = (turns - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
    return (1 - blend) * f / p["factor"] + blend * f


def _yarn(plain: list[float], dim: int, theta: float, p: dict[str, Any]) -> list[float]:
    def index(turns: float) -> float:
        return dim * math.log(p["original_length"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(index(32)), 0), min(math.ceil(index(1)), dim - 1)
    out = []
    for i, f in enumerate(plain):
        gamma = min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
        out.append(gamma * f / p["factor"] + (1 - gamma) * f)
    return out
