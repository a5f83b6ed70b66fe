"""Intervals by hand, and their coverage in simulations whose truth is known."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from fedmllm.evaluation.intervals import Z, auc_interval, macro_f1_interval, mean_interval, resamples
from fedmllm.evaluation.metrics import auc, macro_f1, numbered, ones


def test_resamples_are_the_same_for_every_metric_and_model() -> None:
    draws = resamples(7, 50, seed=3)
    assert draws.shape == (50, 7)
    assert draws.min() >= 0
    assert draws.max() == 6
    assert np.array_equal(draws, resamples(7, 50, seed=3))
    assert not np.array_equal(draws, resamples(7, 50, seed=4))


@pytest.mark.parametrize(("right", "n"), [(0, 20), (10, 10), (59, 60), (400, 1000)])
def test_the_interval_of_an_accuracy_is_wilsons(right: int, n: int) -> None:
    values = np.arange(n) < right
    low, high = mean_interval(values.astype(float))
    # Both ends solve (p − θ)² = z² θ(1 − θ) / n, or are 0 or 1.
    for theta in (low, high):
        assert (right / n - theta) ** 2 == pytest.approx(Z**2 * theta * (1 - theta) / n, abs=1e-12) or theta in (0, 1)
    assert low <= right / n <= high
    assert low < high


def test_an_interval_narrows_with_the_spread_of_its_values() -> None:
    # Two models that answer different halves correctly have a mean of ½ at every sample.
    halves = np.array([0.0, 1.0] * 50)
    assert np.diff(mean_interval((halves + halves[::-1]) / 2)) < np.diff(mean_interval(halves)) / 3


def _coverage(truth: float, intervals: list[list[float]]) -> float:
    return 100 * float(np.mean([low <= truth <= high for low, high in intervals]))


@pytest.mark.parametrize("truth", [0.02, 0.1, 0.4, 0.9, 0.99])
def test_coverage_of_accuracy(truth: float) -> None:
    # The exact distribution of hits among 100, not a simulation. Near 0 and 1 hits come in few steps, so no interval has 95 %.
    n = 100
    held = [math.comb(n, k) * truth**k * (1 - truth) ** (n - k) for k in range(n + 1)]
    inside = [low <= truth <= high for low, high in (mean_interval((np.arange(n) < k).astype(float)) for k in range(n + 1))]
    assert 92 < 100 * float(np.dot(held, inside)) < 98.5


def _auc_intervals(shift: float, spread: float, positives: int, n: int, count: int, seed: int) -> list[list[float]]:
    rng, intervals = np.random.default_rng(seed), []
    positive = np.arange(n) < positives
    for _ in range(count):
        scores = rng.normal(0, 1, n)
        scores[positive] = rng.normal(shift, spread, positives)
        intervals.append(auc_interval(float(auc(ones(n), positive, scores)[0]), positive, [scores]))
    return intervals


@pytest.mark.parametrize("truth", [0.6, 0.8, 0.9])
def test_coverage_of_auc_with_ten_positives_in_a_hundred(truth: float) -> None:
    shift = math.sqrt(2) * NormalDist().inv_cdf(truth)
    assert 93 <= _coverage(truth, _auc_intervals(shift, 1.0, 10, 100, 1500, seed=2)) <= 97


@pytest.mark.parametrize(("spread", "positives", "n"), [(2.0, 10, 100), (0.5, 10, 100), (1.0, 100, 200)])
def test_coverage_of_auc_with_other_spreads_and_sizes(spread: float, positives: int, n: int) -> None:
    shift = 1.2
    truth = NormalDist().cdf(shift / math.sqrt(1 + spread**2))
    assert 92 <= _coverage(truth, _auc_intervals(shift, spread, positives, n, 300, seed=2)) <= 98.5


CLASSES = {
    "steps": np.array([0.4, 0.2, 0.13, 0.09, 0.06, 0.05, 0.03, 0.025, 0.015]),
    "geometric": 0.6 ** np.arange(9) / np.sum(0.6 ** np.arange(9)),
}


@pytest.mark.parametrize(("shares", "accuracy"), [("steps", 0.3), ("steps", 0.7), ("geometric", 0.5), ("geometric", 0.7)])
def test_coverage_of_macro_f1_over_nine_skewed_classes(shares: str, accuracy: float) -> None:
    """An answer is right with the probability `accuracy`, else one of the other classes by their shares."""
    rng, p, intervals = np.random.default_rng(3), CLASSES[shares], []
    answer = (1 - accuracy) * np.where(np.eye(9, dtype=bool), 0, p) / (1 - p[:, None]) + accuracy * np.eye(9)
    joint = p[:, None] * answer
    f1 = 2 * np.diag(joint) / (joint.sum(axis=0) + joint.sum(axis=1))
    for _ in range(500):
        labels, answers = divmod(rng.choice(81, 350, p=joint.ravel()), 9)
        truth, predicted = numbered(map(str, labels), map(str, labels)), numbered(map(str, answers), map(str, labels))
        hits = truth == predicted
        score = float(macro_f1(ones(350), truth, predicted, hits)[0])
        intervals.append(macro_f1_interval(score, truth, [predicted], [hits]))
    assert 93 <= _coverage(float(f1.mean()), intervals) <= 97


def test_perfect_scores_have_intervals_too() -> None:
    truth = np.arange(90) % 9
    low, high = macro_f1_interval(1.0, truth, [truth], [truth >= 0])
    assert (low, high) == (pytest.approx(1 / (1 + Z**2 / 90)), 1.0), "as for an accuracy"
    positive = np.arange(100) < 10
    assert auc_interval(1.0, positive, [positive.astype(float)])[0] == pytest.approx(0.92, abs=0.01)
    assert auc_interval(0.0, positive, [1.0 - positive])[1] == pytest.approx(0.08, abs=0.01)
    assert all(map(math.isnan, auc_interval(math.nan, positive, [positive * math.nan])))


def test_the_mean_of_several_models_varies_less_than_one() -> None:
    rng, positive = np.random.default_rng(0), np.arange(200) < 60
    scores = [positive + rng.normal(0, 2, 200) for _ in range(20)]
    value = float(np.mean([auc(ones(200), positive, s) for s in scores]))
    alone = auc_interval(value, positive, scores[:1])
    assert np.diff(auc_interval(value, positive, scores)) < np.diff(alone) / 2
    assert np.diff(auc_interval(value, positive, scores[:1] * 20)) == pytest.approx(np.diff(alone))
    truth, hits = np.arange(200) % 4, [rng.random(200) < 0.5 for _ in range(20)]
    predicted = [np.where(hit, truth, -1) for hit in hits]
    f1 = float(np.mean([macro_f1(ones(200), truth, p, h) for p, h in zip(predicted, hits, strict=True)]))
    assert (
        np.diff(macro_f1_interval(f1, truth, predicted, hits))
        < np.diff(macro_f1_interval(f1, truth, predicted[:1], hits[:1])) / 2
    )
