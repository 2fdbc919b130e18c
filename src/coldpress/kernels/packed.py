"""Codes of matrices that other tools quantized: brought into the layout of ONNX Runtime's MatMulNBits, or dequantized.

    W       weights [n, k]; w' = (code - zero) * scale
    G       groups of a row: columns that share scale and zero point
    rows    uint8 [n, ceil(k*bits/8)]: the codes of a row, the lower column in the lower bits, 4 or 8 bits each
    scales  [n, G] in any float type
    zeros   uint8 [n, G], one a byte; None means 2^(bits-1) everywhere

Rows are what all layouts come to: it is MatMulNBits' own order (see `kernels.quantize`), so that nothing is left to do
but to repeat the scales of groups that are larger than a block. Words are little-endian int32.
Sources: `pack_original` in gptqmodel/nn_modules/qlinear/__init__.py; awq/modules/linear/gemm.py;
compressors/pack_quantized/helpers.py in compressed_tensors; `QuantState` in bitsandbytes/functional.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "add_to_codes",
    "awq_columns",
    "awq_rows",
    "dequantize_groups",
    "four_bit_values",
    "in_blocks",
    "pack_codes",
    "spread",
    "transposed_words",
    "unpack_bytes",
]

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where the code of each of 8 columns stands in its word: AWQ fills nibbles with columns 0, 2, 4, 6, 1, 3, 5, 7."""


def unpack_bytes(packed: Array, bits: int) -> Bytes:
    """Codes of the last axis of bytes or words, one a byte."""
    data: Bytes = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return data
    out = np.empty((*data.shape, 2), np.uint8)
    np.bitwise_and(data, 0x0F, out=out[..., 0])
    np.right_shift(data, 4, out=out[..., 1])
    return out.reshape(*data.shape[:-1], 2 * data.shape[-1])


def pack_codes(codes: Bytes, bits: int) -> Bytes:
    """Inverse of `unpack_bytes`; an odd last column gets a zero beside it."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    packed: Bytes = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return packed


def transposed_words(words: Array) -> Bytes:
    """Rows of GPTQ's words [k*bits/32, n], each of which holds consecutive rows of W^T."""
    rows: Bytes = np.ascontiguousarray(words.T).view(np.uint8)
    return rows


def awq_rows(words: Array) -> Bytes:
    """Rows of AWQ's words [k, n/8], each of which holds eight columns of W^T; k must be even."""
    unsigned = words.view(np.uint32)
    even, odd = unsigned[0::2], unsigned[1::2]
    out = np.empty((8 * words.shape[1], words.shape[0] // 2), np.uint8)
    for column, shift in enumerate(_AWQ_SHIFTS):
        out[column::8] = (((even >> shift) & 15) | (((odd >> shift) & 15) << 4)).T
    return out


def awq_columns(words: Array) -> Bytes:
    """Codes [G, n] of AWQ's words [G, n/8]."""
    shifts = np.array(_AWQ_SHIFTS, np.uint32)
    codes = (np.ascontiguousarray(words).view(np.uint32)[:, :, None] >> shifts) & np.uint32(15)
    narrow: Bytes = codes.astype(np.uint8)
    return narrow.reshape(len(words), -1)


def add_to_codes(words: Array, bits: int, value: int) -> Array:
    """`value` added to each code of int32 words in one addition, so that an overflow carries into the next code.

    That is how GPTQ's first format was written and is read (`convert_gptq_v1_to_v2_format_module` in
    gptqmodel/utils/model.py); it matters only where a code of zero was stored as -1.
    """
    every = sum(value << shift for shift in range(0, 32, bits))
    total: Array = np.ascontiguousarray(words).view(np.uint32) + np.uint32(every)
    return total


def in_blocks(
    rows: Bytes, scales: Array, zeros: Bytes | None, *, bits: int, k: int, group: int, block_size: int
) -> tuple[Bytes, Array, Bytes | None]:
    """Codes, scales and zero points as MatMulNBits takes them; `block_size` must divide `group` and k."""
    blocks = k // block_size
    codes = rows.reshape(len(rows), blocks, block_size * bits // 8)
    repeats = group // block_size
    scales = np.repeat(scales, repeats, axis=1)[:, :blocks]
    if zeros is not None:
        zeros = pack_codes(np.repeat(zeros, repeats, axis=1)[:, :blocks], bits)
    return codes, scales, zeros


def dequantize_groups(codes: Bytes, scales: Array, zeros: Bytes | None, *, bits: int, group_of: Array) -> Floats:
    """W' float32 [n, k] from codes one a byte; `group_of` [k] is the group of each column. Peak: twice the result."""
    n, k = codes.shape
    out = codes.astype(np.float32)
    if zeros is None:
        out -= np.float32(1 << (bits - 1))
    scales = scales.astype(np.float32)
    groups = scales.shape[1]
    size = k // groups
    if k == size * groups and np.array_equal(group_of, np.arange(k) // size):
        blocks = out.reshape(n, groups, size)
        if zeros is not None:
            blocks -= zeros[:, :, None]
        blocks *= scales[:, :, None]
        return out
    if zeros is not None:
        out -= zeros[:, group_of]
    out *= scales[:, group_of]
    return out


def spread(values: Array, block: tuple[int, int], start: int, rows: int, k: int) -> Array:
    """Scales [.., ..] of blocks of W as one for each weight of rows `start` on: [rows, k], or [rows, 1] where a block
    is as wide as W."""
    chosen = values[start // block[0] : -(-(start + rows) // block[0])]
    skip = start % block[0]
    tall = np.repeat(chosen, block[0], axis=0)[skip : skip + rows]
    return tall if tall.shape[1] == 1 else np.repeat(tall, block[1], axis=1)[:, :k]


def four_bit_values(data: Bytes, absmax: Floats, code: Floats, *, first: int, count: int, block: int) -> Floats:
    """Weights `first` to `first + count` (in memory order) of bitsandbytes' 4-bit bytes.

    `data` starts with the byte of weight `first`, the even weight in the high nibble; `absmax` with its block.
    """
    nibbles = np.stack([data >> 4, data & 15], axis=-1).reshape(-1)[first % 2 : first % 2 + count]
    skip = first % block
    scales = np.repeat(absmax, block)[skip : skip + count]
    return code[nibbles] * scales
