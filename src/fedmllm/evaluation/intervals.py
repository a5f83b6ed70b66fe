"""Bootstrap intervals over test samples (Efron 1979, percentile form)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedmllm.rng import stream

Indices = NDArray[np.int64]


def resamples(n: int, draws: int, seed: int) -> Indices:
    """(draws, n) indices drawn with replacement, the same for every metric and model, so that differences are paired."""
    return stream(seed, "bootstrap", n).integers(0, max(1, n), size=(draws, n))


def percentile_interval(values: NDArray[np.float64], level: float = 0.95) -> list[float]:
    """[low, high] of the middle `level` of `values`; NaN draws (a class was absent) are left out."""
    known = values[~np.isnan(values)]
    if not len(known):
        return [float("nan"), float("nan")]
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def mean_interval(values: NDArray[np.float64], draws: Indices) -> list[float]:
    """The 95 % interval of the mean of `values`, computed for all draws at once."""
    return percentile_interval(values[draws].mean(axis=1))


def interval(statistic: Callable[[Indices], float], draws: Indices) -> list[float]:
    """The 95 % interval of a statistic, which is called once per draw of indices."""
    return percentile_interval(np.array([statistic(draw) for draw in draws]))
