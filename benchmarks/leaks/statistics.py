"""The figures of an attack: AUC, true-positive rate, their intervals, and what differential privacy guarantees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, t

from fedmllm.evaluation.metrics import placements
from leaks.victim import Floats

DELTA = 1e-4


def auc_and_tpr(members: Floats, outsiders: Floats, share: float = 0.01) -> tuple[float, float]:
    """(AUC, true-positive rate at the false-positive rate `share`) of scores.

    A member is found if at most a `share` of outsiders and itself score as high as it does. A score that says nothing finds
    a `share` of the members, whatever the number of outsiders.
    """
    positive = np.arange(len(members) + len(outsiders)) < len(members)
    above, _ = placements(positive, np.concatenate([members, outsiders]))
    as_high = (outsiders[None, :] >= members[:, None]).sum(axis=1)
    return float(above.mean()), float(((as_high + 1) / (len(outsiders) + 1) <= share + 1e-12).mean())


def ceiling(noise: float, share: float = 0.01) -> tuple[float, float]:
    """The (AUC, TPR) that no attack on one noisy sum exceeds: the Gaussian mechanism is μ-GDP with μ = 2 / noise, because one
    sample more or less can turn a client's clipped update into its opposite (Dong, Roth and Su 2019, 1905.02383)."""
    if noise == 0:
        return 1.0, 1.0
    return float(norm.cdf(np.sqrt(2) / noise)), float(norm.cdf(norm.ppf(share) + 2 / noise))


def epsilon(noise: float, delta: float = DELTA) -> float:
    """ε of one noisy sum, adding or removing one client that certainly takes part (Balle and Wang 2018, 1805.06530)."""
    if noise == 0:
        return np.inf
    mu = 1 / noise

    def excess(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - np.exp(eps + norm.logcdf(-mu / 2 - eps / mu))) - delta

    return float(brentq(excess, 0.0, mu * (mu + 20)))


def interval(values: Sequence[float], low: float = 0.0, high: float = 1.0) -> str:
    """The mean and its 95 % interval over repetitions (Student's t), cut at `low` and `high`."""
    mean, n = float(np.mean(values)), len(values)
    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else np.nan
    return f"{mean:.2f} [{max(low, mean - half):.2f}, {min(high, mean + half):.2f}]"
