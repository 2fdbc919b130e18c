"""4-bit round trips against bitsandbytes and against a slow float64 oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from coldpress.kernels import nf4

SHAPES = [(192, 64), (33, 70), (7, 258), (1100, 1024)]
"""Several blocks each; ragged ends; the last is worked on in two chunks."""


def weight(shape: tuple[int, int], seed: int = 0) -> npt.NDArray[Any]:
    import ml_dtypes

    rng = np.random.default_rng(seed)
    rows = rng.uniform(0.01, 1, (shape[0], 1))
    return (rng.standard_normal(shape) * rows).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_equals_bitsandbytes(shape: tuple[int, int], quant_type: Any, double_quant: bool) -> None:
    pytest.importorskip("bitsandbytes")
    from coldpress.nn.imports import load_bitsandbytes

    load_bitsandbytes()
    import torch
    from bitsandbytes import functional

    given = weight(shape)
    theirs = torch.from_numpy(given.astype(np.float32)).to(torch.bfloat16)
    packed, state = functional.quantize_4bit(theirs, quant_type=quant_type, compress_statistics=double_quant)
    expected = functional.dequantize_4bit(packed, state).float().numpy()
    found = nf4.round_trip(given, quant_type=quant_type, double_quant=double_quant).astype(given.dtype)
    differ = found.astype(np.float32) != expected
    # Without double quantization bit for bit. With it the mean of the scales depends on the order of a sum, which may
    # move a scale that lies between two codes to the other one.
    assert differ.mean() <= (0.002 if double_quant else 0.0)
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=0.02, atol=1e-6)


def test_dynamic_code_equals_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    from coldpress.nn.imports import load_bitsandbytes

    load_bitsandbytes()
    from bitsandbytes import functional

    np.testing.assert_array_equal(nf4.dynamic_code(), functional.create_dynamic_map().numpy())


def slow_round_trip(values: npt.NDArray[Any], code: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Block by block and value by value, in float64."""
    flat = values.astype(np.float64).reshape(-1)
    out = []
    for start in range(0, flat.size, nf4.BLOCK):
        block = flat[start : start + nf4.BLOCK]
        peak = max(abs(value) for value in block)
        out += [min(code.astype(np.float64), key=lambda c: abs(value / peak - c)) * peak for value in block]
    return np.array(out).reshape(values.shape)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_oracle(quant_type: Any) -> None:
    given = np.random.default_rng(1).standard_normal((5, 77)).astype(np.float32)
    expected = slow_round_trip(given, nf4.CODES[quant_type])
    # 1e-6: float32 products against float64 ones.
    np.testing.assert_allclose(nf4.round_trip(given, quant_type=quant_type), expected, rtol=1e-6, atol=1e-6)


def test_double_quantization_changes_little() -> None:
    given = weight((192, 64)).astype(np.float32)
    once, twice = nf4.round_trip(given), nf4.round_trip(given, double_quant=True)
    assert 0 < np.abs(once - twice).mean() < 0.05 * np.abs(given - once).mean() + 0.002
    assert np.abs(given - twice).mean() < 1.1 * np.abs(given - once).mean()


def test_zeros_and_a_second_trip() -> None:
    assert not nf4.round_trip(np.zeros((3, 64), np.float32)).any()
    once = nf4.round_trip(weight((192, 64)))
    np.testing.assert_allclose(nf4.round_trip(once), once, rtol=1e-6)


@pytest.mark.parametrize("width", [64, 128, 192, 768, 1024])
def test_rows_of_whole_blocks_are_safe_in_bitsandbytes(width: int) -> None:
    """The widths that QLoRA relies on; with 96, say, bitsandbytes 0.50 on AVX512 is wrong (`four_bit_names`)."""
    pytest.importorskip("bitsandbytes")
    from coldpress.nn.imports import load_bitsandbytes

    load_bitsandbytes()
    import torch
    from bitsandbytes import functional

    given = weight((40, width))
    packed, state = functional.quantize_4bit(torch.from_numpy(given.astype(np.float32)), quant_type="nf4")
    np.testing.assert_array_equal(functional.dequantize_4bit(packed, state).numpy(), nf4.round_trip(given))
