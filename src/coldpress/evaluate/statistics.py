"""Standard errors. Values of one cluster (a prompt that occurs twice, tokens of one text) are no independent witnesses.

    x_i     a value of a record, n of them, in clusters c
    mean    sum x_i / n,    its error   sqrt(sum_c (sum_{i in c} (x_i - mean))^2) / n     (Liang and Zeger 1986)
    ratio   r = sum a_c / sum b_c,      sqrt(sum_c (a_c - r b_c)^2) / sum b_c             (its first-order term)

With clusters of one the first is sqrt(p (1 - p) / n) of a share. Everything else (F1, a percentile) is resampled:
clusters are drawn with replacement, the statistic is computed again, and the spread is its error (Efron 1979).
A single cluster says nothing of how much clusters differ: then there is no error, which is None, and not 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["RESAMPLES", "bootstrap_error", "mean_error", "quantile", "ratio_error"]

RESAMPLES = 1000
"""Draws of a bootstrap; the error of the error is about 2 %."""


def mean_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> tuple[float, float | None]:
    """(mean, its standard error) of values; each is its own cluster unless they are named."""
    n = len(values)
    mean = math.fsum(values) / n
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, range(n) if clusters is None else clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    if len(sums) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum(total**2 for total in sums.values())) / n


def ratio_error(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float | None]:
    """(sum a / sum b, its standard error) of clusters with a and b each: a loss a token over texts of any length."""
    whole = math.fsum(denominators)
    ratio = math.fsum(numerators) / whole
    if len(denominators) < 2:
        return ratio, None
    spread = math.fsum((a - ratio * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return ratio, math.sqrt(spread) / whole


def bootstrap_error(
    statistic: Callable[[npt.NDArray[np.intp]], float],
    n: int,
    rng: np.random.Generator,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
) -> float | None:
    """Standard error of `statistic`, a function of the positions (0 to n - 1) that a sample holds."""
    import numpy as np

    members: list[npt.NDArray[np.intp]] = [np.array([place]) for place in range(n)]
    if clusters is not None:
        found: dict[Hashable, list[int]] = {}
        for place, cluster in enumerate(clusters):
            found.setdefault(cluster, []).append(place)
        members = [np.array(places) for places in found.values()]
    if len(members) < 2:
        return None
    alone = len(members) == n
    values = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(members), len(members))
        values.append(statistic(drawn if alone else np.concatenate([members[one] for one in drawn])))
    return float(np.std(values, ddof=1))


def quantile(values: Sequence[float], share: float) -> float:
    """Between the two nearest values, linearly: 0.5 is the median."""
    import numpy as np

    return float(np.quantile(np.asarray(values, np.float64), share))
