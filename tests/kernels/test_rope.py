"""Rotary tables against the float64 oracle and against Transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coldpress.kernels.rope import ROPE_KINDS, cos_sin, inverse_frequencies
from oracles.rope import frequencies

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192},
    "yarn": {"factor": 8.0, "original_length": 4096},
    "longrope": {"factors": [1.0 + 0.1 * i for i in range(32)], "factor": 32.0, "original_length": 4096},
}


@pytest.mark.parametrize("kind", CASES)
def test_frequencies_agree_with_the_oracle(kind: str) -> None:
    got, scale = inverse_frequencies(kind, 64, 500000.0, **CASES[kind])
    expected, expected_scale = frequencies(kind, 64, 500000.0, CASES[kind])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # float32 has 6e-8 a step; a power takes a few
    assert scale == pytest.approx(expected_scale)


def test_every_kind_has_a_case() -> None:
    assert set(CASES) == set(ROPE_KINDS)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn", "longrope"])
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = {key: value for key, value in CASES[kind].items() if key not in ("original_length", "factors")}
    if "original_length" in CASES[kind]:
        theirs["original_max_position_embeddings"] = CASES[kind]["original_length"]
    if kind == "longrope":
        theirs |= {"short_factor": CASES[kind]["factors"], "long_factor": [9.0] * 32}
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": kind, "rope_theta": 500000.0, **theirs},
    )
    expected, expected_scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    got, scale = inverse_frequencies(kind, 64, 500000.0, **CASES[kind])
    np.testing.assert_allclose(got, expected.numpy(), rtol=3e-7)  # the last digit of a float32 power
    assert scale == pytest.approx(expected_scale)


def test_tables_hold_cos_and_sin_of_their_positions() -> None:
    f, _ = inverse_frequencies("default", 16, 10000.0)
    cos, sin = cos_sin(f, 1.5, 3, 200)
    angles = np.arange(3, 200)[:, None] * f[None, :].astype(np.float64)
    # Angles reach 200 radians, where float32 steps are 1.5e-5.
    np.testing.assert_allclose(cos, 1.5 * np.cos(angles), atol=5e-5)
    np.testing.assert_allclose(sin, 1.5 * np.sin(angles), atol=5e-5)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs"):
        inverse_frequencies("default", 7, 10000.0)
    with pytest.raises(ValueError, match="one factor per frequency"):
        inverse_frequencies("longrope", 8, 10000.0, factors=[1.0], factor=2.0, original_length=16)
