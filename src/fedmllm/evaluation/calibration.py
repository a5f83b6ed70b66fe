"""Calibration of closed questions: do the probabilities of the options say how often they are right?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 15


@dataclass(frozen=True)
class Bin:
    """The answers whose confidence, the probability of the chosen option, lies in one bin; NaN means without answers."""

    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """`ece` is the expected calibration error, Σ n_b/n |accuracy_b − confidence_b| over `BINS` bins of equal width, closed
    above (Guo et al. 2017, 1706.04599). `brier` is the mean of Σ_k (p_k − y_k)² over all options, between 0 and 2 (Brier
    1950); for two options it is twice the form that looks at one of them."""

    ece: float
    brier: float
    bins: tuple[Bin, ...]


def calibration(probabilities: Sequence[Sequence[float]], right: Sequence[int]) -> Calibration:
    """`probabilities[i]` are those of the options of question i, and `right[i]` is the index of its right option. The chosen
    option is the most probable one, the first of equals. Raises ValueError without questions."""
    if not probabilities:
        raise ValueError("calibration needs at least one question")
    confidence = np.array([max(options) for options in probabilities])
    hits = np.array([np.argmax(options) == index for options, index in zip(probabilities, right, strict=True)])
    numbers = np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    bins, nan = [], float("nan")
    for number in range(BINS):
        inside = numbers == number
        means = (float(confidence[inside].mean()), float(hits[inside].mean())) if inside.any() else (nan, nan)
        bins.append(Bin(int(inside.sum()), *means))
    ece = sum(b.n * abs(b.accuracy - b.confidence) for b in bins if b.n) / len(hits)
    errors = [
        sum((p - (k == index)) ** 2 for k, p in enumerate(options)) for options, index in zip(probabilities, right, strict=True)
    ]
    return Calibration(ece, float(np.mean(errors)), tuple(bins))
