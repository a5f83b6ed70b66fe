"""95 % intervals over test samples: score intervals, which hold every θ with (θ̂ − θ)² ≤ z² V(θ).

- A mean of n values between 0 and 1, and macro-F1: Wilson's interval (1927), V(θ) = θ(1 − θ) / m, where m is the number of
  yes/no answers that would be as uncertain. m = θ̃(1 − θ̃) / Ṽ is computed with half a hit and half a miss added, in each class
  for macro-F1, so that it is known where all answers are right. For one model it is n for accuracy and at most n for macro-F1.
- AUC: Newcombe's interval (2006, Statistics in Medicine 25:559, method 5), V(θ) = θ(1 − θ) {1 + ν [(1 − θ)/(2 − θ) +
  θ/(1 + θ)]} / (ab) with a positives, b negatives and ν = (a + b)/2 − 1, scaled to DeLong's variance at θ̂, but to no less than
  0.65 of itself, because few positives tell their own spread badly. Z is widened to Student's t with Satterthwaite's degrees of
  freedom, by the first term of its expansion, t / z = 1 + (z² + 1) / (4 df).

With several models, the score is their mean, and so is what each sample adds to it. A percentile bootstrap covers 87 % instead
of 95 % with ten positives in a hundred samples, and 88 % with nine skewed classes; `tests/test_intervals.py` simulates both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fedmllm.evaluation.metrics import Classes, Floats, by_class, placements
from fedmllm.rng import stream

Indices = NDArray[np.int64]
Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""
_LEAST_SCALE = 0.65


def resamples(n: int, draws: int, seed: int) -> Indices:
    """(draws, n) indices drawn with replacement, the same for every metric and model, so that differences are paired."""
    return stream(seed, "bootstrap", n).integers(0, max(1, n), size=(draws, n))


def wilson(score: float, m: float) -> list[float]:
    """Wilson's interval of a score that is as uncertain as a share of `m` answers."""
    scale = 1 + Z * Z / m
    middle = (score + Z * Z / (2 * m)) / scale
    half = Z / scale * sqrt(score * (1 - score) / m + Z * Z / (4 * m * m))
    return [min(max(0.0, middle - half), score), max(min(1.0, middle + half), score)]


def mean_interval(values: Floats) -> list[float]:
    """The interval of the mean of `values` (n,), each between 0 and 1."""
    n = len(values)
    weights, extended = np.append(np.ones(n), [0.5, 0.5]), np.append(values, [0.0, 1.0])
    mean = np.average(extended, weights=weights)
    variance = np.average((extended - mean) ** 2, weights=weights) / n
    return wilson(float(values.mean()), float(mean * (1 - mean) / variance))


def macro_f1_interval(
    score: float, truth: Classes, predicted: Sequence[Classes], hits: Sequence[NDArray[np.bool_]]
) -> list[float]:
    """The interval of macro-F1, averaged over models; `truth` has every class from 0 to K − 1.

    Ṽ is that of the delta method (Takahashi et al. 2022, Applied Intelligence 52:4961), with the part of a class of n samples
    multiplied by n / (n − 1), at most by 2.
    """
    sizes = np.bincount(truth)
    k = len(sizes)
    classes = np.arange(k)
    extended = np.concatenate([truth, classes, classes])
    weights = np.concatenate([np.ones(len(truth)), np.full(2 * k, 0.5)]) * (sizes / (sizes + 1))[extended]
    models = [
        _influence(
            weights,
            extended,
            np.concatenate([answers, classes, np.full(k, -1)]),
            np.concatenate([hit, classes >= 0, classes < 0]),
        )
        for answers, hit in zip(predicted, hits, strict=True)
    ]
    smoothed = float(np.mean([value for value, _ in models]))
    influence = np.mean([of_model for _, of_model in models], axis=0)
    factors = np.minimum(sizes / np.maximum(sizes - 1, 0.5), 2)[extended] * weights
    variance = float(factors @ influence**2)
    alone = float(np.mean([factors @ of_model**2 for _, of_model in models]))
    most = len(truth) * alone / variance  # the mean of several models varies less than one of them
    return wilson(score, min(most, smoothed * (1 - smoothed) / variance))


def _influence(weights: Floats, truth: Classes, predicted: Classes, hits: NDArray[np.bool_]) -> tuple[float, Floats]:
    """(macro-F1, (n,) its derivative with respect to the weight of each sample)."""
    k = int(truth.max()) + 1
    true, given, right = (
        by_class(w[None], c, k)[0] for w, c in ((weights, truth), (weights, predicted), (weights * hits, truth))
    )
    both = true + given
    lost = 2 * right / both**2  # what a sample that is of the class, or is given it, takes from the class's F1
    of_prediction = np.where(predicted >= 0, lost[predicted], 0)
    return float(np.mean(2 * right / both)), (hits * 2 / both[truth] - lost[truth] - of_prediction) / k


def auc_interval(score: float, positive: NDArray[np.bool_], scores: Sequence[Floats]) -> list[float]:
    """The interval of the mean over models of AUC; `scores` (n,) of each model. NaN where the AUC is."""
    a, b = int(positive.sum()), int((~positive).sum())
    if np.isnan(score) or min(a, b) < 1:
        return [float("nan")] * 2
    of_models = [placements(positive, values) for values in scores]
    variance, df = _delong(np.mean([p for p, _ in of_models], axis=0), np.mean([n for _, n in of_models], axis=0))
    alone = float(np.mean([_delong(p, n)[0] for p, n in of_models]))
    nu = (a + b) / 2 - 1

    def newcombe(theta: float) -> float:
        return theta * (1 - theta) * (1 + nu * ((1 - theta) / (2 - theta) + theta / (1 + theta))) / (a * b)

    least = _LEAST_SCALE * (variance / alone if alone else 1.0)  # the mean of several models varies less than one of them
    expected = newcombe(score)
    scale = max(least, variance / expected * (1 + (Z * Z + 1) / (4 * df)) ** 2 if expected and variance else 0.0)
    return [_end(score, end, lambda theta: Z * Z * scale * newcombe(theta)) for end in (0.0, 1.0)]


def _delong(of_positives: Floats, of_negatives: Floats) -> tuple[float, float]:
    """DeLong's variance of the AUC and its degrees of freedom. A class of one sample has no known spread and adds nothing."""
    classes = [values for values in (of_positives, of_negatives) if len(values) > 1]
    parts = [float(np.var(values, ddof=1) / len(values)) for values in classes]
    of_parts = sum(part**2 / (len(values) - 1) for part, values in zip(parts, classes, strict=True))
    return sum(parts), sum(parts) ** 2 / of_parts if of_parts else 1.0


def _end(score: float, end: float, bound: Callable[[float], float]) -> float:
    """The θ between `score` and `end` with (θ̂ − θ)² = bound(θ), by bisection."""
    inside, outside = score, end
    for _ in range(50):
        middle = (inside + outside) / 2
        if (score - middle) ** 2 <= bound(middle):
            inside = middle
        else:
            outside = middle
    return inside
