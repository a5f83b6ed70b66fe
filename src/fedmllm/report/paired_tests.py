"""Is one method better than another? Paired tests on the same test samples, and a correction for multiple tests.

If a method was run with several seeds, its score is the mean over them, and each test sample counts once. `paired` tests
whether the difference would hold on other test samples for these trained models; `sign_flip` tests whether it would hold in
other settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmllm.evaluation.intervals import percentile_interval, resamples
from fedmllm.rng import stream

Floats = NDArray[np.float64]
PERMUTATIONS = 10_000
EXACT = 14
"""Up to this many units, all 2ⁿ assignments of signs are enumerated."""
_CHUNK = 1000
"""Permutations per batch; memory is proportional to this times the number of test samples."""


@dataclass(frozen=True)
class Answered:
    """One model's answers: `predicted` (n,), and for AUC `score` (n,), the probability of the positive answer, NaN for samples
    that do not have it among their choices."""

    predicted: NDArray[np.str_]
    score: Floats


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs in shares of 1, its 95 % interval, and the two-sided p value under no difference."""

    difference: float
    low: float
    high: float
    p: float


def paired(
    metric: str, truth: NDArray[np.str_], positive: str | None, pairs: Sequence[tuple[Answered, Answered]], seed: int
) -> Difference:
    """The mean difference over pairs (ours, theirs) of models that answered the same samples.

    "auc": DeLong, DeLong and Clarke-Pearson (1988) for interval and test, on placements averaged over the pairs. "accuracy"
    and "macro_f1": the randomisation test (Noreen 1989) that exchanges both sides' answers to a sample, with the plus one of
    Phipson and Smyth (2010), and a paired bootstrap interval. Raises ValueError for another metric.
    """
    if metric == "auc":
        return _delong(truth == positive, pairs)
    if metric not in ("accuracy", "macro_f1"):
        raise ValueError(f"there is no paired test for the metric {metric!r}")
    measure = _Accuracy(truth, pairs) if metric == "accuracy" else _MacroF1(truth, pairs)
    n = len(truth)
    observed = float(measure.exchanged(np.zeros((1, n)))[0])
    rng, as_far = stream(seed, "permutations", n), 0
    for start in range(0, PERMUTATIONS, _CHUNK):
        masks = rng.integers(0, 2, size=(min(_CHUNK, PERMUTATIONS - start), n)).astype(np.float64)
        # The tolerance makes equal differences count as equal whatever the order of summation.
        as_far += int(np.sum(np.abs(measure.exchanged(masks)) >= abs(observed) - 1e-12))
    draws = resamples(n, 1000, seed)
    weights = np.stack([np.bincount(draw, minlength=n) for draw in draws]).astype(np.float64)
    low, high = percentile_interval(measure.weighted(weights))
    return Difference(observed, low, high, (1 + as_far) / (1 + PERMUTATIONS))


class _Accuracy:
    def __init__(self, truth: NDArray[np.str_], pairs: Sequence[tuple[Answered, Answered]]) -> None:
        gaps = [(ours.predicted == truth).astype(float) - (theirs.predicted == truth) for ours, theirs in pairs]
        self._gap: Floats = np.mean(gaps, axis=0)

    def exchanged(self, masks: Floats) -> Floats:
        """(k,) differences after exchanging the two sides' answers to the samples where mask (k, n) is 1."""
        return (1 - 2 * masks) @ self._gap / len(self._gap)

    def weighted(self, weights: Floats) -> Floats:
        """(k,) differences if sample i counts weights[k, i] times."""
        return weights @ self._gap / len(self._gap)


class _MacroF1:
    """Hits and predictions per class are sums over samples, so any exchange or weighting is a matrix product."""

    def __init__(self, truth: NDArray[np.str_], pairs: Sequence[tuple[Answered, Answered]]) -> None:
        labels = np.unique(truth)
        self._true = (truth[:, None] == labels).astype(np.float64)
        self._said = [tuple((one.predicted[:, None] == labels).astype(np.float64) for one in pair) for pair in pairs]

    def exchanged(self, masks: Floats) -> Floats:
        """As for accuracy."""
        true = self._true.sum(axis=0)
        total = np.zeros(len(masks))
        for ours, theirs in self._said:
            moved = masks @ (theirs - ours)
            hits = masks @ ((theirs - ours) * self._true)
            total += _f1(true, ours.sum(axis=0) + moved, (ours * self._true).sum(axis=0) + hits)
            total -= _f1(true, theirs.sum(axis=0) - moved, (theirs * self._true).sum(axis=0) - hits)
        return total / len(self._said)

    def weighted(self, weights: Floats) -> Floats:
        """As for accuracy."""
        true = weights @ self._true
        total = np.zeros(len(weights))
        for ours, theirs in self._said:
            total += _f1(true, weights @ ours, weights @ (ours * self._true))
            total -= _f1(true, weights @ theirs, weights @ (theirs * self._true))
        return total / len(self._said)


def _f1(true: Floats, said: Floats, hits: Floats) -> Floats:
    """The mean F1 over the classes that occur in the truth, from counts (k, classes)."""
    occurs = true > 0
    scores = np.divide(2 * hits, true + said, out=np.zeros(np.broadcast_shapes(true.shape, said.shape)), where=occurs)
    return np.asarray(scores.sum(axis=-1) / occurs.sum(axis=-1))


def _placements(positive: NDArray[np.bool_], score: Floats) -> tuple[Floats, Floats]:
    """For each positive the share of negatives below it, for each negative the share of positives above it; ties half."""
    yes, no = np.sort(score[positive]), np.sort(score[~positive])
    below = np.searchsorted(no, score[positive], "left") + np.searchsorted(no, score[positive], "right")
    above = 2 * len(yes) - np.searchsorted(yes, score[~positive], "left") - np.searchsorted(yes, score[~positive], "right")
    return below / (2 * len(no)), above / (2 * len(yes))


def _delong(positive: NDArray[np.bool_], pairs: Sequence[tuple[Answered, Answered]]) -> Difference:
    asked = ~np.all([np.isnan(one.score) for pair in pairs for one in pair], axis=0)
    positive, scores = positive[asked], [(ours.score[asked], theirs.score[asked]) for ours, theirs in pairs]
    if min(positive.sum(), (~positive).sum()) < 2 or np.isnan(scores).any():
        return Difference(math.nan, math.nan, math.nan, math.nan)
    of_yes, of_no = [], []
    for ours, theirs in scores:
        (a_yes, a_no), (b_yes, b_no) = _placements(positive, ours), _placements(positive, theirs)
        of_yes.append(a_yes - b_yes)
        of_no.append(a_no - b_no)
    yes, no = np.mean(of_yes, axis=0), np.mean(of_no, axis=0)
    difference = float(yes.mean())
    deviation = math.sqrt(yes.var(ddof=1) / len(yes) + no.var(ddof=1) / len(no))
    least = 1 / (1 + PERMUTATIONS)  # the least p of the other tests; a normal approximation should not claim more
    if deviation < 1e-12:  # the sides differ by the same amount for every sample, or not at all
        return Difference(difference, difference, difference, 1.0 if abs(difference) < 1e-12 else least)
    reach, p = 1.959963984540054 * deviation, math.erfc(abs(difference) / deviation / math.sqrt(2))
    return Difference(difference, difference - reach, difference + reach, max(least, p))


def sign_flip(differences: Sequence[float], seed: int) -> float:
    """The two-sided p value under mean 0 (Fisher's randomisation test): each difference is equally likely to have either sign.

    Exact up to 14 units, with a least value of 2/2ⁿ; estimated from 10,000 draws above that. NaN without units.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if not n:
        return math.nan
    least = abs(float(values.sum())) - 1e-12
    if n <= EXACT:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= least))
    signs = stream(seed, "sign flips", n).integers(0, 2, size=(PERMUTATIONS, n)) * 2 - 1
    return (1 + int(np.sum(np.abs(signs @ values) >= least))) / (1 + PERMUTATIONS)


def holm(ps: Sequence[float]) -> list[float]:
    """The p values corrected for their number (Holm 1979), in their order; NaN stays NaN and is not counted."""
    return list(_holm(np.asarray(ps, dtype=np.float64)))


def _holm(ps: Floats) -> Iterator[float]:
    known = np.flatnonzero(~np.isnan(ps))
    corrected, least = np.full(len(ps), math.nan), 0.0
    for rank, index in enumerate(known[np.argsort(ps[known], kind="stable")]):
        least = max(least, min(1.0, (len(known) - rank) * float(ps[index])))
        corrected[index] = least
    return iter(corrected.tolist())
