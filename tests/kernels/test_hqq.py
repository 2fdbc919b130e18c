"""Half-quadratic quantization against its float64 oracle, and against round-to-nearest on heavy-tailed weights."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from coldpress.kernels.hqq import quantize_half_quadratic
from coldpress.kernels.quantize import NonFiniteWeightError, Quantized, dequantize, quantize, unpack
from oracles.half_quadratic import half_quadratic
from oracles.quantization import dequantize_block_by_block


def heavy(n: int, k: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (n, k)) * rng.uniform(0.01, 2.0, (n, 1))).astype(np.float32)


def in_steps(w: np.ndarray, scales: np.ndarray, size: int) -> np.ndarray:
    return w.astype(np.float64) / np.repeat(scales, size, axis=1)[:, : w.shape[1]]


def mean_errors(v: np.ndarray, zeros: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Of each block, in steps, under its zero point."""
    z = np.repeat(np.asarray(zeros, np.float64), size, axis=1)[:, : v.shape[1]]
    sizes = np.abs(v - (np.clip(np.floor(v + z + 0.5), 0, 2**bits - 1) - z))
    return np.array([[block.mean() for block in np.split(row, range(size, len(row), size))] for row in sizes])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize("extra", [0, 5])
def test_agrees_with_the_oracle(bits: int, size: int, extra: int) -> None:
    k = 4 * size + extra
    w = heavy(60, k)
    got = quantize_half_quadratic(w, bits=bits, block_size=size)
    codes, scales, zeros = half_quadratic(w, bits, size)
    assert got.zeros is not None
    assert got.zeros.shape == scales.shape
    np.testing.assert_allclose(got.scales, scales, rtol=1e-6)
    # Rounds end where the error stops to fall. In float32 that may be one round sooner or later, and a weight half-way
    # between two codes may fall to either side: a few blocks end at another zero point, as often better as worse.
    v = in_steps(w, scales, size)
    lost = mean_errors(v, got.zeros, bits, size) / mean_errors(v, zeros, bits, size) - 1
    assert np.mean(np.abs(lost) < 1e-4) > 0.95
    assert abs(lost.mean()) < 5e-3
    apart = np.abs(got.zeros - zeros)
    assert np.median(apart) < 1e-6 * 2 ** (bits - 4)
    same = np.repeat(apart < 1e-4, size, axis=1)[:, :k]
    difference = np.abs(unpack(got.codes, bits).reshape(60, -1)[:, :k].astype(int) - codes)[same]
    assert difference.max() <= 1
    assert np.mean(difference != 0) < 5e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_rounding_does_not_agree_with_the_oracle(bits: int) -> None:
    """The twin: without the rounds, errors are seen to be others."""
    w = heavy(60, 128)
    _, scales, zeros = half_quadratic(w, bits, 32)
    plain = quantize(w, bits=bits, block_size=32, symmetric=False)
    assert plain.zeros is not None
    rounded = unpack(np.asarray(plain.zeros, np.uint8), bits)[:, :4]
    v = in_steps(w, scales, 32)
    lost = mean_errors(v, rounded, bits, 32) / mean_errors(v, zeros, bits, 32) - 1
    assert np.mean(np.abs(lost) < 1e-4) < 0.2


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_heavy_tails_lose_less_than_with_rounding(size: int, dtype: type) -> None:
    w = heavy(64, 768, seed=1).astype(dtype)
    wide = w.astype(np.float32)

    def error(found: Quantized, norm: float) -> np.ndarray:
        steps = np.repeat(np.abs(found.scales), size, axis=1)[:, :768]
        in_steps = np.abs(dequantize(found, bits=4, k=768) - wide) / steps
        blocks: np.ndarray = (in_steps**norm).reshape(64, -1, size).mean(axis=2)
        return blocks

    plain = quantize(w, bits=4, block_size=size, symmetric=False)
    fitted = quantize_half_quadratic(w, bits=4, block_size=size)
    for norm in (11 / 16, 1.0, 2.0):
        assert error(fitted, norm).mean() < 0.99 * error(plain, norm).mean()
    assert np.all(error(fitted, 1.0) <= error(plain, 1.0) + 1e-4)  # block by block


def test_dequantize_reads_float_zero_points() -> None:
    w = heavy(3, 3 * 32 + 7)
    got = quantize_half_quadratic(w, bits=4, block_size=32)
    codes = dequantize_block_by_block(got.codes, np.ones_like(got.scales), np.zeros((3, 2), np.uint8), 4, 103)
    scales, zeros = (np.repeat(np.asarray(part), 32, axis=1)[:, :103] for part in (got.scales, got.zeros))
    np.testing.assert_allclose(dequantize(got, bits=4, k=103), (codes - zeros) * scales, rtol=1e-5, atol=1e-6)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    w = heavy(9, 100)
    whole = quantize_half_quadratic(w, bits=4, block_size=32)
    parts = [quantize_half_quadratic(w[start : start + 3], bits=4, block_size=32) for start in (0, 3, 6)]
    np.testing.assert_array_equal(whole.codes, np.concatenate([part.codes for part in parts]))
    np.testing.assert_array_equal(whole.zeros, np.concatenate([part.zeros for part in parts]))


def test_zeros_one_value_and_what_is_not_finite() -> None:
    w = np.zeros((3, 64), np.float32)
    w[1, :32] = 0.7
    w[2, :32] = 1e-38
    got = quantize_half_quadratic(w, bits=4, block_size=32)
    np.testing.assert_allclose(dequantize(got, bits=4, k=64)[:2], w[:2], atol=1e-6)
    assert np.all(dequantize(got, bits=4, k=64)[2] == 0)
    w[2, 40] = np.nan
    with pytest.raises(NonFiniteWeightError, match="row 2"):
        quantize_half_quadratic(w, bits=4, block_size=32)


@pytest.mark.parametrize(("bits", "size"), [(3, 32), (4, 48)])
def test_sizes_that_do_not_exist_are_refused(bits: int, size: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        quantize_half_quadratic(heavy(1, 64), bits=bits, block_size=size)
