"""The benchmark's metrics, as functions of answers and scores. Independent of any model.

Each takes weights (k, n) and returns its k values: how often each of the n samples counts, in each of k resamples of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Classes = NDArray[np.int64]
"""The class of each sample, from 0; −1 for an answer that is none of the classes."""


def by_class(values: Floats, classes: Classes, count: int) -> Floats:
    """(k, count): the sums of `values` (k, n) over the samples of each class."""
    order = np.argsort(classes, kind="stable")
    order = order[classes[order] >= 0]
    present, starts = np.unique(classes[order], return_index=True)
    sums = np.zeros((len(values), count))
    if len(order):
        sums[:, present] = np.add.reduceat(values[:, order], starts, axis=1)
    return sums


def macro_f1(weights: Floats, truth: Classes, predicted: Classes, hits: NDArray[np.bool_]) -> Floats:
    """The unweighted mean F1 over the classes that occur in the truth. Any other answer is wrong but adds no class.

    `hits` says which answers are right: a wrong answer can have the class of the right one if a question's choices differ in
    less than classes do. NaN without samples.
    """
    count = int(truth.max(initial=-1)) + 1
    true, given = by_class(weights, truth, count), by_class(weights, predicted, count)
    present = true > 0
    f1 = 2 * by_class(weights * hits, truth, count) / np.maximum(true + given, 1e-12)
    with np.errstate(invalid="ignore"):
        mean: Floats = (f1 * present).sum(axis=1) / present.sum(axis=1)
    return mean


def auc(weights: Floats, positive: NDArray[np.bool_], scores: Floats) -> Floats:
    """The area under the ROC curve: how often a positive scores above a negative, with ties counting half.

    NaN if a class is absent or a score is NaN.
    """
    if np.isnan(scores).any():
        return np.full(len(weights), np.nan)
    values, rank = np.unique(scores, return_inverse=True)
    above = by_class(weights * positive, rank, len(values))
    below = by_class(weights * ~positive, rank, len(values))
    wins = (above * (np.cumsum(below, axis=1) - below / 2)).sum(axis=1)
    with np.errstate(invalid="ignore"):
        share: Floats = wins / (above.sum(axis=1) * below.sum(axis=1))
    return share


def placements(positive: NDArray[np.bool_], scores: Floats) -> tuple[Floats, Floats]:
    """For each positive the share of negatives below it, for each negative the share of positives above it; ties count half.

    The mean of either is the AUC (DeLong, DeLong and Clarke-Pearson 1988).
    """
    above, below = np.sort(scores[positive]), np.sort(scores[~positive])
    of_positives = np.searchsorted(below, scores[positive], "left") + np.searchsorted(below, scores[positive], "right")
    of_negatives = np.searchsorted(above, scores[~positive], "left") + np.searchsorted(above, scores[~positive], "right")
    return of_positives / (2 * len(below)), 1 - of_negatives / (2 * len(above))


def ones(n: int) -> Floats:
    """The weights of the samples themselves: each counts once."""
    return np.ones((1, n))


def numbered(labels: Iterable[str], known: Iterable[str]) -> Classes:
    """The position of each label among the sorted distinct `known` ones, −1 for another label."""
    positions = {label: i for i, label in enumerate(sorted(set(known)))}
    return np.array([positions.get(label, -1) for label in labels], dtype=np.int64)
