"""bitsandbytes' 4-bit weights: quantize and dequantize, in numpy.

    w        weight, any shape, read in memory order in blocks of 64
    m[b]     absmax of block b, float32
    code     16 values in [-1, 1]: nf4 (quantiles of a normal distribution) or fp4
    q        index of the code nearest to w / m[b]
    double   m itself is stored in 8 bits: m - mean(m), in blocks of 256 with absmax s, nearest of 256 dynamic codes
    w'       code[q] * m'[b],  m' = dynamic[qm] * s + mean(m)

The same values as `bitsandbytes.functional.quantize_4bit` and `dequantize_4bit` on the CPU, but for the last bit of
mean(m), which depends on the order of the sum. Source: Dettmers et al. 2023, sections 3 and appendix E; Dettmers
et al. 2021 (8-bit optimizers) for the dynamic code.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK", "CHUNK", "CODES", "block_scales", "dynamic_code", "round_trip", "round_trip_blocks"]

BLOCK = 64
"""Weights that share an absmax."""
CHUNK = 1 << 20
"""Weights worked on at a time; a multiple of the block."""
_NESTED_BLOCK = 256
_POINTS = 65535

Floats = npt.NDArray[np.float32]

CODES: dict[str, Floats] = {
    "nf4": np.array(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
        np.float32,
    ),
    # FP4 with sign, two exponent bits and one mantissa bit, divided by its greatest value; sorted here.
    "fp4": np.sort(
        np.array([s * v / 12 for s in (1, -1) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)], np.float32)
    ),
}  # fmt: skip


@functools.cache
def dynamic_code() -> Floats:
    """The signed dynamic 8-bit data type, sorted: bitsandbytes' `create_dynamic_map()`."""
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        bounds = _linspace(2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        scaled = (np.float32(10.0 ** (exponent - 6)) * means).tolist()
        values += scaled + [-value for value in scaled]
    return np.array(sorted(values), np.float32)


def _linspace(count: int) -> Floats:
    """`torch.linspace(0.1, 1, count)` in float32, bit for bit: each half is counted from its own end."""
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(count - 1))
    place = np.arange(count)
    # Fused multiply-add rounds once; so does float64 arithmetic cast to float32.
    values = np.where(place < count // 2, first + step * place, last - step * (count - 1 - place))
    return np.asarray(values, np.float32)


def round_trip(
    weight: npt.NDArray[Any], *, quant_type: Literal["nf4", "fp4"] = "nf4", double_quant: bool = False
) -> Floats:
    """What is left of `weight` after 4-bit quantization: float32, same shape.

    Peak memory: the result, and 24 bytes for each of `CHUNK` weights.
    """
    flat = np.ascontiguousarray(weight).reshape(-1)
    out = np.empty(flat.size, np.float32)
    pieces = [slice(start, start + CHUNK) for start in range(0, flat.size, CHUNK)]
    scales = block_scales((flat[piece] for piece in pieces), double_quant=double_quant)
    for piece in pieces:
        blocks = slice(piece.start // BLOCK, -(-piece.stop // BLOCK))
        out[piece] = round_trip_blocks(flat[piece], scales[blocks], quant_type=quant_type)
    return out.reshape(weight.shape)


def block_scales(pieces: Iterable[npt.NDArray[Any]], *, double_quant: bool = False) -> Floats:
    """m' of each block of a weight, given in flat pieces in memory order, all but the last of whole blocks."""
    absmax = np.concatenate([_absmax(piece.astype(np.float32), BLOCK) for piece in pieces])
    return _nested_round_trip(absmax) if double_quant else absmax


def round_trip_blocks(flat: npt.NDArray[Any], scales: Floats, *, quant_type: Literal["nf4", "fp4"] = "nf4") -> Floats:
    """What is left of whole blocks of a weight (the last one may be cut), with their m' from `block_scales`."""
    code = CODES[quant_type]
    values = flat.astype(np.float32)
    return _scaled(code[_nearest(values, _absmax(values, BLOCK), BLOCK, code)], scales, BLOCK)


def _nested_round_trip(absmax: Floats) -> Floats:
    mean = np.float32(absmax.mean(dtype=np.float64))
    centred = absmax - mean
    scale = _absmax(centred, _NESTED_BLOCK)
    code = dynamic_code()
    scaled = np.clip(_scaled(centred, _inverse(scale), _NESTED_BLOCK), -1, 1)
    # bitsandbytes looks the code up in a table of 65,536 points between -1 and 1.
    points = np.rint((scaled + np.float32(1)) * np.float32(_POINTS / 2)).astype(np.intp)
    return np.asarray(_scaled(code[_nearest_to_points()[points]], scale, _NESTED_BLOCK) + mean, np.float32)


@functools.cache
def _nearest_to_points() -> npt.NDArray[np.intp]:
    code = dynamic_code()
    points = np.arange(_POINTS + 1, dtype=np.float32) * np.float32(2 / _POINTS) - np.float32(1)
    return np.asarray(np.searchsorted((code[:-1] + code[1:]) / np.float32(2), points, side="left"), np.intp)


def _absmax(flat: Floats, block: int) -> Floats:
    starts = np.arange(0, flat.size, block)
    return np.maximum.reduceat(np.abs(flat), starts)


def _nearest(flat: Floats, absmax: Floats, block: int, code: Floats) -> npt.NDArray[np.intp]:
    """Index of the code nearest to each value over its block's absmax; a tie goes to the smaller code."""
    scaled = np.clip(_scaled(flat, _inverse(absmax), block), -1, 1)
    return np.asarray(np.searchsorted((code[:-1] + code[1:]) / np.float32(2), scaled, side="left"), np.intp)


def _inverse(absmax: Floats) -> Floats:
    return np.asarray(np.float32(1) / np.maximum(absmax, np.float32(1e-38)), np.float32)


def _scaled(flat: Floats, factor: Floats, block: int) -> Floats:
    whole = flat.size // block * block
    out = np.empty_like(flat)
    np.multiply(flat[:whole].reshape(-1, block), factor[: whole // block, None], out=out[:whole].reshape(-1, block))
    if whole < flat.size:
        np.multiply(flat[whole:], factor[-1], out=out[whole:])
    return out
