"""The benchmark's metrics, as functions of answers and scores. Independent of any model."""

from __future__ import annotations

import re
import string
from collections import Counter

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower-case the text and remove punctuation, articles and extra space (the normalisation of SQuAD, 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(predicted: str, truth: str) -> float:
    """The F1 of the words shared by the two normalised answers."""
    a, b = normalise(predicted).split(), normalise(truth).split()
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b)) if shared else float(a == b)


def macro_f1(truth: ArrayLike, predicted: ArrayLike) -> float:
    """The unweighted mean F1 over the classes that occur in the truth. Any other answer is wrong but adds no class."""
    t, p = np.asarray(truth), np.asarray(predicted)
    scores = []
    for label in np.unique(t):
        hits = np.sum((t == label) & (p == label))
        scores.append(2 * hits / (np.sum(t == label) + np.sum(p == label)))
    return float(np.mean(scores)) if scores else float("nan")


def auc(positive: ArrayLike, scores: ArrayLike) -> float:
    """The area under the ROC curve: how often a positive scores above a negative, with ties counting half.

    Computed from ranks (Mann and Whitney 1947), O(n log n). NaN if a class is absent or a score is NaN.
    """
    is_positive, values = np.asarray(positive, dtype=bool), np.asarray(scores, dtype=np.float64)
    count = int(is_positive.sum())
    if count in (0, len(is_positive)) or np.isnan(values).any():
        return float("nan")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]  # tied values share their mean rank
    return float((ranks[is_positive].sum() - count * (count + 1) / 2) / (count * (len(values) - count)))
