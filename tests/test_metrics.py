from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.evaluation.intervals import interval, mean_interval, percentile_interval, resamples
from fedmllm.evaluation.metrics import auc, macro_f1, normalise, token_f1
from helpers import quick

pairs = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30)
labels = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1, max_size=30)


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("  The  red\tCircle! ", "red circle"),
        ("an apple, a day", "apple day"),
        ("theatre", "theatre"),
        ("A", ""),
        ("x-ray", "xray"),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(expected) == expected


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        ("the red circle", "A red circle.", 1.0),
        ("red", "blue", 0.0),
        ("red circle", "red square", 0.5),
        ("red red red", "red", 0.5),  # 2·1 / (3 + 1)
        ("", "red", 0.0),
        ("the", "a", 1.0),  # both normalise to nothing
    ],
)
def test_token_f1(predicted: str, truth: str, expected: float) -> None:
    assert token_f1(predicted, truth) == token_f1(truth, predicted) == expected


# Intervals


def test_resamples_are_the_same_for_every_metric_and_model() -> None:
    draws = resamples(7, 50, seed=3)
    assert draws.shape == (50, 7)
    assert draws.min() >= 0
    assert draws.max() == 6
    assert np.array_equal(draws, resamples(7, 50, seed=3))
    assert not np.array_equal(draws, resamples(7, 50, seed=4))


def test_percentile_intervals_by_hand() -> None:
    values = np.arange(101.0)
    assert percentile_interval(values) == pytest.approx([2.5, 97.5])
    assert percentile_interval(values, level=0.5) == pytest.approx([25, 75])


def test_draws_without_a_value_are_left_out() -> None:
    assert percentile_interval(np.array([math.nan, 1.0, 1.0])) == [1, 1]
    assert all(map(math.isnan, percentile_interval(np.array([math.nan]))))


def test_the_interval_of_a_mean_agrees_with_the_general_one() -> None:
    values, draws = np.random.default_rng(0).random(40), resamples(40, 300, seed=0)
    assert mean_interval(values, draws) == pytest.approx(interval(lambda draw: float(values[draw].mean()), draws))


def test_the_interval_covers_the_truth_in_95_percent_of_cases() -> None:
    rng, draws = np.random.default_rng(0), resamples(60, 400, seed=0)
    samples = (rng.random(60) < 0.4 for _ in range(300))
    covered = [low <= 0.4 <= high for low, high in (mean_interval(s.astype(float), draws) for s in samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.04)
