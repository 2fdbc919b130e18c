"""Each kernel against float64, on float32 and on bfloat16 numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from coldpress.kernels.decoder_rows import DecoderRows, decoder_rows

DTYPES = ("float32", "bfloat16")
# Results are rounded once, to 24 or 8 bits, by half a unit in the last place; sums and powers are float32's.
ROUNDED = {"float32": 2e-6, "bfloat16": 2.0**-8}
T, D = 7, 37
FILLING = -1

Array = npt.NDArray[Any]
pytestmark = pytest.mark.parametrize("dtype", DTYPES)


class OnArrays:
    """The kernels, given arrays instead of addresses."""

    def __init__(self, kernels: DecoderRows) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Callable[..., None]:
        kernel = getattr(self._kernels, name)

        def run(*given: Any) -> None:
            assert all(one.flags.c_contiguous for one in given if isinstance(one, np.ndarray))
            kernel(*(one.ctypes.data if isinstance(one, np.ndarray) else one for one in given))

        return run


class Numbers:
    """Arrays of one type as the kernels take them, and what they hold."""

    def __init__(self, dtype: str) -> None:
        self.run = OnArrays(decoder_rows(dtype))
        self.tolerance = ROUNDED[dtype]
        self._type: Any = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
        self._draw = np.random.default_rng(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Array:
        return self.words(self._draw.standard_normal(shape) * scale)

    def words(self, numbers: Array) -> Array:
        made = np.ascontiguousarray(numbers, np.float32).astype(self._type)
        return made if self._type is np.float32 else made.view(np.uint16)

    def value(self, words: Array) -> npt.NDArray[np.float64]:
        return words.view(self._type).astype(np.float64)

    def near(self, words: Array, exact: npt.NDArray[np.float64], size: Any = None) -> None:
        """`size`: of the numbers that the result is a sum of, where that may be smaller than they are."""
        rounding = self.tolerance * np.abs(exact) + 1e-34  # powers end at 2^-126
        summing = 0 if size is None else ROUNDED["float32"] * size
        assert (np.abs(self.value(words) - exact) <= rounding + summing).all()


@pytest.fixture
def numbers(dtype: str) -> Numbers:
    return Numbers(dtype)


def limit(rate: float) -> int:
    return round(rate * 2**32)


def silu(g: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return g / (1 + np.exp(-g))


def test_norm(numbers: Numbers) -> None:
    x, w, y, q = numbers(T, D, scale=3.0), numbers(D), numbers(T, D), np.empty(T, np.float32)
    numbers.run.norm(0, T, D, x, w, 1e-5, y, q)
    inverse = 1 / np.sqrt((numbers.value(x) ** 2).mean(1) + 1e-5)
    np.testing.assert_allclose(q, inverse, rtol=1e-6)  # a float32 sum of 37 squares
    # Two roundings: a normed number that lies between two may have gone to either.
    exact = numbers.value(x) * inverse[:, None] * numbers.value(w)
    assert (np.abs(numbers.value(y) - exact) <= 2 * numbers.tolerance * np.abs(exact)).all()


def test_norm_backward(numbers: Numbers) -> None:
    dy, x, w, dx = numbers(T, D), numbers(T, D), numbers(D), numbers(T, D)
    before = numbers.value(dx)
    inverse = (1 / np.sqrt((numbers.value(x) ** 2).mean(1) + 1e-5)).astype(np.float32)
    numbers.run.norm_backward(0, T, D, dy, x, w, inverse, dx)
    unit = numbers.value(x) * inverse[:, None]
    gradient = numbers.value(dy) * numbers.value(w)
    own = (gradient - unit * (gradient * unit).mean(1, keepdims=True)) * inverse[:, None]
    numbers.near(dx, before + own, np.abs(before) + 8 * np.abs(gradient).max() * inverse[:, None] * np.abs(unit).max())


def test_gate_and_its_gradient(numbers: Numbers) -> None:
    both, dy, y, gradient = numbers(T, 2 * D, scale=6.0), numbers(T, D), numbers(T, D), numbers(T, 2 * D)
    both[0, :4] = numbers.words(np.array([0.0, -100.0, 100.0, 3e4]))  # beyond what e^x can be
    numbers.run.gate(0, T, D, both, y)
    numbers.run.gate_backward(0, T, D, dy, both, gradient)
    g, u, upstream = numbers.value(both[:, :D].copy()), numbers.value(both[:, D:].copy()), numbers.value(dy)
    share = 1 / (1 + np.exp(-g))
    numbers.near(y, silu(g) * u)
    numbers.near(gradient[:, :D].copy(), upstream * u * share * (1 + g * (1 - share)), np.abs(upstream * u * g * share))
    numbers.near(gradient[:, D:].copy(), upstream * silu(g))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_dropout_keeps_as_many_as_the_rate_says(numbers: Numbers, rate: float) -> None:
    x = numbers.words(np.ones((1000, 1001)))
    y, onto = np.empty_like(x), x.copy()
    numbers.run.dropped(0, 1000, 1001, x, 1, 2, limit(rate), y)
    stays = numbers.value(y)
    assert set(np.unique(stays)) == ({0.0, 1.0} if rate else {1.0})
    # Six standard errors of a million draws; rows, columns and neighbours are alike in that.
    error = 6 * np.sqrt(rate * (1 - rate) / 1e6)
    assert stays.mean() == pytest.approx(1 - rate, abs=error)
    for axis in (0, 1):
        assert np.abs(stays.mean(axis) - (1 - rate)).max() <= error * np.sqrt(1000) + 1e-12
        assert (stays * np.roll(stays, 1, axis)).mean() == pytest.approx((1 - rate) ** 2, abs=2 * error + 1e-12)
    numbers.run.add_dropped(0, 1000, 1001, x, 1, 2, limit(rate), onto)
    assert (numbers.value(onto) == 1 + stays).all(), "the same mask"


def test_other_seeds_are_another_mask(numbers: Numbers) -> None:
    x = numbers.words(np.ones((1000, 1000)))
    masks = []
    for seeds in ((1, 2), (1, 3), (2, 2), (2**32 - 1, 2**31)):
        y = np.empty_like(x)
        numbers.run.dropped(0, 1000, 1000, x, *seeds, limit(0.5), y)
        masks.append(numbers.value(y))
    for place, one in enumerate(masks):
        for other in masks[:place]:
            # Independent halves: both keep a quarter, within six standard errors.
            assert (one * other).mean() == pytest.approx(0.25, abs=6 * np.sqrt(3 / 16 / 1e6))


def test_causal_softmax_and_its_gradient(numbers: Numbers) -> None:
    scores, upstream, scale = numbers(3, 9, 9, scale=20.0), numbers(3, 9, 9), 0.125
    exact = numbers.value(scores) * scale + np.triu(np.full((9, 9), -np.inf), 1)
    exact = np.exp(exact - exact.max(-1, keepdims=True))
    exact /= exact.sum(-1, keepdims=True)
    numbers.run.softmax(0, 3, 9, scores, scale)
    numbers.near(scores, exact)
    shares, gradient = numbers.value(scores), numbers.value(upstream)
    numbers.run.softmax_backward(0, 3, 9, upstream, scores, scale)
    wanted = shares * (gradient - (shares * gradient).sum(-1, keepdims=True)) * scale
    numbers.near(upstream, wanted, shares * scale * 2 * np.abs(gradient).max())


def test_heads_apart_and_back(numbers: Numbers) -> None:
    heads, turned, size, tokens = 5, 3, 8, 6
    row, angles = numbers(tokens, heads * size), np.random.default_rng(1).uniform(0, 6, (tokens, size // 2))
    cos, sin = (numbers.words(np.concatenate((one, one), 1)) for one in (np.cos(angles), np.sin(angles)))
    take = np.array([0, 1, 2, 3, 4, FILLING, 5, FILLING], np.int32)
    states = numbers(heads, len(take), size)
    numbers.run.spread(0, len(take), heads, size, turned, len(take), row, take, cos, sin, states)
    x = numbers.value(row).reshape(tokens, heads, size).transpose(1, 0, 2)
    half = np.concatenate((-x[..., size // 2 :], x[..., : size // 2]), -1)
    exact = np.where(np.arange(heads)[:, None, None] < turned, x * numbers.value(cos) + half * numbers.value(sin), x)
    numbers.near(states[:, [0, 1, 2, 3, 4, 6]].copy(), exact, np.abs(x).max())
    assert not numbers.value(states[:, [5, 7]].copy()).any(), "a filling position is 0"
    back = numbers(tokens, heads * size)
    numbers.run.join(0, len(take), heads, size, turned, len(take), 0, states, take, cos, sin, back)
    # There and back: cos and sin are rounded, so that their squares add up to 1 only so far.
    np.testing.assert_allclose(numbers.value(back), numbers.value(row), atol=12 * numbers.tolerance)
    once, twice = numbers.value(back), np.zeros_like(back)
    for _ in range(2):
        numbers.run.join(0, len(take), heads, size, turned, len(take), 1, states, take, cos, sin, twice)
    numbers.near(twice, 2 * once, 2 * np.abs(once).max())


def test_narrow_and_widen(numbers: Numbers) -> None:
    x, y, wide = np.random.default_rng(0).standard_normal(D).astype(np.float32), numbers(D), np.empty(D, np.float32)
    numbers.run.narrow(0, D, x, 1.5, y)
    numbers.near(y, x.astype(np.float64) * 1.5)
    numbers.run.widen(0, D, y, 0.75, wide)
    np.testing.assert_allclose(wide, numbers.value(y) * 0.75, rtol=ROUNDED["float32"])


def test_parts_are_the_whole(numbers: Numbers) -> None:
    """Threads that share a call write what one writes."""
    k, x, w = numbers.run, numbers(T, D), numbers(D)
    whole, parts, q = numbers(T, D), numbers(T, D), np.empty(T, np.float32)
    k.norm(0, T, D, x, w, 1e-5, whole, q)
    for first, last in ((0, 3), (3, 3), (3, T)):
        k.norm(first, last, D, x, w, 1e-5, parts, q)
    assert (whole == parts).all()
    for first, last in ((0, 2), (2, T)):
        k.dropped(first, last, D, x, 5, 6, limit(0.5), parts)
    k.dropped(0, T, D, x, 5, 6, limit(0.5), whole)
    assert (whole == parts).all()
