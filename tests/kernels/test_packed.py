"""Codes of other tools, one at a time and all at once."""

from __future__ import annotations

import numpy as np
import pytest

from coldpress.kernels.packed import (
    add_to_codes,
    awq_columns,
    awq_rows,
    dequantize_groups,
    four_bit_values,
    in_blocks,
    pack_codes,
    spread,
    transposed_words,
    unpack_bytes,
)
from oracles.stored import NF4, awq_tensors, gptq_tensors, on_grid, word

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(0, 1, (64, 96)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_and_back(bits: int) -> None:
    codes = RNG.integers(0, 1 << bits, (5, 24)).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, 24 * bits // 8)
    np.testing.assert_array_equal(unpack_bytes(packed, bits), codes)
    np.testing.assert_array_equal(unpack_bytes(packed.view(np.int32), bits), codes)
    share = 32 // bits
    assert packed.view(np.int32)[2, 1] == word(list(codes[2, share : 2 * share]), bits)


def test_an_odd_last_column_gets_a_zero() -> None:
    np.testing.assert_array_equal(pack_codes(np.array([[1, 2, 3]], np.uint8), 4), [[0x21, 0x03]])


@pytest.mark.parametrize("bits", [4, 8])
def test_words_of_gptq(bits: int) -> None:
    grid = on_grid(WEIGHTS, bits=bits, group=32, symmetric=False)
    words = gptq_tensors("x", grid, first_format=False)["x.qweight"]
    np.testing.assert_array_equal(unpack_bytes(transposed_words(words), bits), grid.codes)


def test_words_of_awq() -> None:
    grid = on_grid(WEIGHTS, bits=4, group=32, symmetric=False)
    tensors = awq_tensors("x", grid)
    np.testing.assert_array_equal(unpack_bytes(awq_rows(tensors["x.qweight"]), 4), grid.codes)
    np.testing.assert_array_equal(awq_columns(tensors["x.qzeros"]), grid.zeros.T)
    np.testing.assert_array_equal(unpack_bytes(awq_rows(tensors["x.qweight"][:, 3:5]), 4), grid.codes[24:40])


def test_adding_one_carries_as_it_was_borrowed() -> None:
    true = np.array([[0, 5, 15, 0, 8, 8, 8, 8]], np.uint8)
    stored = np.array([[word(list(true[0]), 4)]], np.int32) - np.int32(0x11111111)  # what the writer does
    np.testing.assert_array_equal(unpack_bytes(add_to_codes(stored, 4, 1), 4), true)
    assert not np.array_equal(unpack_bytes(stored, 4) + 1 & 15, true)  # code by code would be wrong
    eight = np.array([[word([7, 8, 127, 254], 8)]], np.int32)
    np.testing.assert_array_equal(unpack_bytes(add_to_codes(eight, 8, 1), 8), [[8, 9, 128, 255]])


@pytest.mark.parametrize("group", [16, 32, 40, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scattered", [True, False])
def test_dequantized_equals_one_weight_at_a_time(group: int, symmetric: bool, scattered: bool) -> None:
    group_of = RNG.permutation(np.arange(96) // (96 if group == -1 else group)) if scattered else None
    grid = on_grid(WEIGHTS, bits=4, group=group, symmetric=symmetric, group_of=group_of)
    zeros = None if symmetric else grid.zeros.astype(np.uint8)
    found = dequantize_groups(grid.codes.astype(np.uint8), grid.scales, zeros, bits=4, group_of=grid.group_of)
    assert found.dtype == np.float32
    # Codes and scales of float16 are exact in float32, and so is their product.
    np.testing.assert_array_equal(found, grid.values())


def test_scales_of_large_groups_are_repeated() -> None:
    grid = on_grid(WEIGHTS, bits=4, group=48, symmetric=False)
    rows = pack_codes(grid.codes.astype(np.uint8), 4)
    codes, scales, zeros = in_blocks(
        rows, grid.scales, grid.zeros.astype(np.uint8), bits=4, k=96, group=48, block_size=16
    )
    assert codes.shape == (64, 6, 8)
    np.testing.assert_array_equal(unpack_bytes(codes, 4).reshape(64, 96), grid.codes)
    np.testing.assert_array_equal(scales, grid.scales[:, [0, 0, 0, 1, 1, 1]])
    assert zeros is not None
    np.testing.assert_array_equal(unpack_bytes(zeros, 4), grid.zeros[:, [0, 0, 0, 1, 1, 1]])


def test_scales_of_blocks_are_spread() -> None:
    values = np.arange(6.0).reshape(2, 3)
    for start, rows in ((0, 7), (3, 3), (4, 2), (6, 1)):
        expected = [[values[row // 4, column // 2] for column in range(5)] for row in range(start, start + rows)]
        np.testing.assert_array_equal(spread(values, (4, 2), start, rows, 5), expected)
    np.testing.assert_array_equal(spread(values[:, :1], (4, 9), 3, 3, 9), [[0], [3], [3]])


def test_four_bit_weights_from_any_place() -> None:
    codes = RNG.integers(0, 16, 400)
    absmax = RNG.uniform(1, 2, 7).astype(np.float32)
    data = np.array([codes[i] * 16 + codes[i + 1] for i in range(0, 400, 2)], np.uint8)
    code = np.array(NF4, np.float32)
    for first, count in ((0, 400), (63, 2), (65, 1), (129, 200)):
        found = four_bit_values(
            data[first // 2 : -(-(first + count) // 2)], absmax[first // 64 :], code, first=first, count=count, block=64
        )
        expected = [code[codes[i]] * absmax[i // 64] for i in range(first, first + count)]
        np.testing.assert_array_equal(found, np.array(expected, np.float32))
