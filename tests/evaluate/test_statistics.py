"""Standard errors against simulation: what they say is how much the figures scatter."""

from __future__ import annotations

import math

import numpy as np
import pytest

from coldpress.evaluate.statistics import bootstrap_error, mean_error, quantile, ratio_error


def test_the_mean_of_a_share() -> None:
    values = [1.0] * 30 + [0.0] * 10
    mean, error = mean_error(values)
    assert (mean, error) == (0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 40)))
    assert mean_error(values, range(40)) == (mean, pytest.approx(error))


def test_repeats_bear_no_witness() -> None:
    values, clusters = [1.0, 0.0, 1.0, 1.0], ["a", "b", "c", "d"]
    _, error = mean_error(values, clusters)
    _, tripled = mean_error(values * 3, clusters * 3)
    assert tripled == pytest.approx(error), "every record three times is as sure as once"
    assert mean_error(values * 3)[1] == pytest.approx(error / math.sqrt(3)), "where it would be taken for more"


def test_errors_are_the_scatter_of_clustered_data() -> None:
    rng = np.random.default_rng(0)
    found, told = [], []
    for _ in range(400):
        common = rng.normal(size=30)
        values = (common[:, None] + 0.3 * rng.normal(size=(30, 5))).ravel()
        mean, error = mean_error(values.tolist(), np.repeat(np.arange(30), 5).tolist())
        found.append(mean)
        told.append(error)
    # 400 draws know a standard deviation to 4 %, and 30 clusters tell theirs 2 % too small.
    assert np.mean(told) == pytest.approx(np.std(found), rel=0.1)


def test_errors_of_a_ratio() -> None:
    rng = np.random.default_rng(1)
    found, told = [], []
    for _ in range(400):
        tokens = rng.integers(10, 100, 40).astype(float)
        losses = tokens * rng.normal(3, 0.5, 40)
        ratio, error = ratio_error(losses.tolist(), tokens.tolist())
        assert ratio == pytest.approx(losses.sum() / tokens.sum())
        found.append(ratio)
        told.append(error)
    assert np.mean(told) == pytest.approx(np.std(found), rel=0.1)


def test_bootstrap_of_a_mean_is_its_formula() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=60)
    clusters = np.repeat(np.arange(20), 3).tolist()
    for groups in (None, clusters):
        drawn = bootstrap_error(
            lambda rows: float(values[rows].mean()), 60, np.random.default_rng(0), clusters=groups, resamples=4000
        )
        # 4,000 draws: 1 % by chance, and the draws' own factor sqrt(1 - 1 / clusters).
        assert drawn == pytest.approx(mean_error(values.tolist(), groups)[1], rel=0.05)


def test_a_single_cluster_has_no_error() -> None:
    assert mean_error([3.0]) == (3.0, None)
    assert mean_error([1.0, 0.0, 1.0, 0.0], ["a"] * 4) == (0.5, None)
    assert ratio_error([8.0], [2.0]) == (4.0, None)
    rng = np.random.default_rng(0)
    assert bootstrap_error(lambda rows: 1.0, 4, rng, clusters=["a"] * 4) is None
    assert bootstrap_error(lambda rows: 1.0, 1, rng) is None
    assert mean_error([2.0, 2.0]) == (2.0, 0.0), "two that agree are something else"


def test_the_seed_decides() -> None:
    def error(seed: int) -> float | None:
        return bootstrap_error(lambda rows: float(rows.mean()), 30, np.random.default_rng(seed), resamples=50)

    assert error(1) == error(1)
    assert error(1) != error(2)


def test_quantiles() -> None:
    assert quantile([4, 1, 3, 2], 0.5) == 2.5
    assert quantile(list(range(101)), 0.99) == 99
