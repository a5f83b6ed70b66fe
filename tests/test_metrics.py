from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from fedmllm.evaluation import metrics
from fedmllm.evaluation.intervals import resamples
from fedmllm.evaluation.metrics import numbered, ones, placements
from helpers import quick

pairs = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30)
labels = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1, max_size=30)


def auc(positive: Sequence[int], scores: ArrayLike) -> float:
    """Of each sample once."""
    return float(metrics.auc(ones(len(positive)), np.array(positive, dtype=bool), np.array(scores, dtype=np.float64))[0])


def macro_f1(truth: Sequence[str], predicted: Sequence[str]) -> float:
    """Of each sample once."""
    t, p = numbered(truth, truth), numbered(predicted, truth)
    return float(metrics.macro_f1(ones(len(truth)), t, p, t == p)[0])


def auc_by_definition(positive: list[bool], scores: list[float]) -> float:
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p, is_p in zip(scores, positive, strict=True) if is_p
        for n, is_n in zip(scores, positive, strict=True) if not is_n
    ]  # fmt: skip
    return sum(wins) / len(wins) if wins else math.nan


@quick
@given(pairs)
def test_auc_is_how_often_a_positive_scores_above_a_negative(rows: list[tuple[bool, int]]) -> None:
    positive, scores = [p for p, _ in rows], [float(s) for _, s in rows]
    assert auc(positive, scores) == pytest.approx(auc_by_definition(positive, scores), nan_ok=True)


@quick
@given(pairs)
def test_auc_is_reversed_with_the_scores_and_depends_only_on_their_order(rows: list[tuple[bool, int]]) -> None:
    positive, scores = [p for p, _ in rows], np.array([float(s) for _, s in rows])
    assert auc(positive, -scores) == pytest.approx(1 - auc(positive, scores), nan_ok=True)
    assert auc(positive, np.exp(scores)) == pytest.approx(auc(positive, scores), nan_ok=True)


def test_auc_by_hand() -> None:
    # Positives 0.8 and 0.4 against negatives 0.4 and 0.1: wins 1, 1, ½, 1 of 4.
    assert auc([1, 1, 0, 0], [0.8, 0.4, 0.4, 0.1]) == 0.875
    assert auc([True, False], [math.inf, -math.inf]) == 1


@pytest.mark.parametrize(("positive", "scores"), [([1, 1], [0, 1]), ([0], [1]), ([], []), ([1, 0, 0], [0.5, math.nan, 0.1])])
def test_auc_is_nan_if_it_is_undefined(positive: list[int], scores: list[float]) -> None:
    assert math.isnan(auc(positive, scores))


@quick
@given(labels)
def test_macro_f1_is_the_mean_of_each_classs_f1(rows: list[tuple[str, str]]) -> None:
    scores = []
    for label in {truth for truth, _ in rows}:
        hits = sum(t == p == label for t, p in rows)
        predicted, true = sum(p == label for _, p in rows), sum(t == label for t, _ in rows)
        precision, recall = hits / predicted if predicted else 0.0, hits / true if true else 0.0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert macro_f1([t for t, _ in rows], [p for _, p in rows]) == pytest.approx(sum(scores) / len(scores))


def test_macro_f1_by_hand() -> None:
    # a: 1 hit, predicted 2 times and true 1 time, F1 = 2/3; b: 1 hit, predicted 1 time and true 2 times, F1 = 2/3.
    assert macro_f1(["a", "b", "b"], ["a", "a", "b"]) == pytest.approx(2 / 3)
    # Only labels in the truth are classes: any other answer, or none, is simply wrong.
    for other in ("?", "", "c"):
        assert macro_f1(["a", "b"], ["a", other]) == pytest.approx((1 + 0) / 2)
    assert math.isnan(macro_f1([], []))


def test_weights_count_samples_as_often_as_they_were_drawn() -> None:
    rng, draws = np.random.default_rng(0), resamples(50, 20, seed=0)
    weights = np.stack([np.bincount(draw, minlength=50) for draw in draws]).astype(float)
    positive, scores = rng.random(50) < 0.3, rng.integers(0, 9, 50).astype(float)
    assert metrics.auc(weights, positive, scores) == pytest.approx([auc(positive[d], scores[d]) for d in draws])
    truth, predicted = rng.choice(list("abc"), 50), rng.choice(list("abcd"), 50)
    t, p = numbered(truth, truth), numbered(predicted, truth)
    expected = [macro_f1(truth[d].tolist(), predicted[d].tolist()) for d in draws]
    assert metrics.macro_f1(weights, t, p, t == p) == pytest.approx(expected)


def test_the_mean_placement_of_either_class_is_the_auc() -> None:
    rng = np.random.default_rng(1)
    positive, scores = rng.random(60) < 0.4, rng.integers(0, 9, 60).astype(float)
    for values in placements(positive, scores):
        assert values.mean() == pytest.approx(auc(positive, scores))


def test_a_thousand_resamples_of_a_thousand_samples_are_quick() -> None:
    rng, began = np.random.default_rng(2), time.process_time()
    weights = rng.multinomial(1000, np.full(1000, 1 / 1000), size=1000).astype(float)
    assert not np.isnan(metrics.auc(weights, rng.random(1000) < 0.3, rng.random(1000))).any()
    assert time.process_time() - began < 3, "it takes a tenth of this"
