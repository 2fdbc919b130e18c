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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize("extra", [0, 5])
def test_agrees_with_the_oracle(bits: int, size: int, extra: int) -> None:
    k = 4 * size + extra
    w = heavy(6, k)
    got = quantize_half_quadratic(w, bits=bits, block_size=size)
    codes, scales, zeros = half_quadratic(w, bits, size)
    assert got.zeros is not None
    assert got.zeros.shape == scales.shape
    np.testing.assert_allclose(got.scales, scales, rtol=1e-6)
    # A weight half-way between two codes may fall to either side in float32, which moves the mean of a block by up to
    # one part of its size; from there the rounds go on, or stop one earlier. Most blocks meet no such weight.
    close = np.abs(got.zeros - zeros) < 1e-3 * 2 ** (bits - 4)
    assert close.mean() > 0.9
    same = np.repeat(close, size, axis=1)[:, :k]
    difference = np.abs(unpack(got.codes, bits).reshape(6, -1)[:, :k].astype(int) - codes)[same]
    assert difference.max() <= 1
    assert np.mean(difference != 0) < 5e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_a_wrong_round_would_be_seen(bits: int) -> None:
    """The twin: zero points of plain rounding are not those of the oracle."""
    w = heavy(6, 128)
    _, _, zeros = half_quadratic(w, bits, 32)
    plain = quantize(w, bits=bits, block_size=32, symmetric=False)
    assert plain.zeros is not None
    rounded = unpack(np.asarray(plain.zeros, np.uint8), bits)[:, :4]
    assert np.mean(np.abs(rounded - zeros) < 1e-3 * 2 ** (bits - 4)) < 0.3


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
