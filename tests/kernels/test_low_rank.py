"""W + B A against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldpress.kernels.low_rank import COLUMNS, add_product


def case(n: int, k: int, rank: int, dtype: object, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((n, k)).astype(np.float32).astype(dtype)
    return weights, rng.standard_normal((n, rank), np.float32), rng.standard_normal((rank, k), np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("rank", [1, 3, 4, 16, 33])
def test_equals_float64(dtype: object, rank: int) -> None:
    w, b, a = case(7, 2 * COLUMNS + 5, rank, dtype)
    exact = w.astype(np.float64) + b.astype(np.float64) @ a.astype(np.float64)
    found = add_product(w, b, a)
    assert found.dtype == np.float32
    # Each of the sums is rounded once to 24 bits, and none is beyond 32.
    assert np.abs(exact).max() < 32
    assert np.abs(found - exact).max() < (rank + 1) * 32 * 2.0**-24


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**16))
def test_rows_do_not_depend_on_each_other(n: int, k: int, rank: int, seed: int) -> None:
    w, b, a = case(n, k, rank, ml_dtypes.bfloat16, seed)
    whole, middle = add_product(w, b, a), n // 2
    assert (add_product(w[middle:], b[middle:], a) == whole[middle:]).all()


def test_shapes_must_fit() -> None:
    w, b, a = case(4, 6, 2, np.float32)
    with pytest.raises(ValueError, match=r"W \[4, 6\], B \[3, 2\]"):
        add_product(w, b[:3], a)
