"""Which method is the best: by simulation with fixed seeds, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedmllm.report.best import cross_fitted, not_beaten
from fedmllm.report.protocol import summary

NAN = math.nan


def scores_of(scores: np.ndarray) -> dict[str, dict[str, dict[str, float]]]:
    """Methods m0, m1, … from (k, P, R) scores."""
    return {
        f"m{k}": {f"p{p}": {str(r): float(score) for r, score in enumerate(units)} for p, units in enumerate(places)}
        for k, places in enumerate(scores)
    }


def drawn(rng: np.random.Generator, means: list[float], places: int, replicates: int, sd: float = 0.06) -> np.ndarray:
    """(k, P, R) scores; a unit's own level is the same for all methods."""
    level = 0.5 + 0.1 * rng.normal(size=(1, places, replicates))
    return np.array(means)[:, None, None] + level + sd * rng.normal(size=(len(means), places, replicates))


@pytest.mark.parametrize(("means", "places"), [([0.0] * 4, 3), ([0.0, 0.0, -0.03, -0.05, -0.2], 1)])
def test_the_set_that_is_not_beaten_holds_the_best(means: list[float], places: int) -> None:
    rng = np.random.default_rng(0)
    sets = [not_beaten(scores_of(drawn(rng, means, places, 5))) for _ in range(300)]
    assert np.mean(["m0" in names for names in sets]) >= 0.93
    if means[-1] < 0:
        assert np.mean(["m4" in names for names in sets]) < 0.1, "a method that is far worse is beaten"


@pytest.mark.parametrize(("places", "replicates"), [(1, 3), (3, 5)])
def test_the_cross_fitted_score_is_unbiased(places: int, replicates: int) -> None:
    """Of equal methods, the highest mean is too high; the cross-fitted score is not, and the interval holds."""
    rng, read, highest, held = np.random.default_rng(0), [], [], []
    for _ in range(500):
        scores = drawn(rng, [0.0] * 5, places, replicates)
        best = cross_fitted(scores_of(scores))
        assert best is not None
        read.append(best.score - 0.5)
        highest.append(scores.mean(axis=(1, 2)).max() - 0.5)
        held.append(best.low <= 0.5 <= best.high)
    errors = np.std(read) / 500**0.5, np.std(highest) / 500**0.5
    assert abs(np.mean(read)) <= 4 * errors[0]
    assert np.mean(highest) > 4 * errors[1]
    assert np.mean(held) >= 0.93


def test_a_clear_best_keeps_its_own_mean() -> None:
    scores = drawn(np.random.default_rng(0), [0.0, 0.4], 2, 4, sd=0.01)
    best = cross_fitted(scores_of(scores))
    assert best is not None
    assert (best.method, best.score) == ("m1", pytest.approx(scores[1].mean()))
    mean = summary(scores_of(scores)["m1"], level=1 - 0.05 / 2)
    assert (best.low, best.high) == (pytest.approx(mean.low), pytest.approx(mean.high))


def test_cross_fitting_by_hand() -> None:
    """Without unit 0, B leads by 4 : 2 and has 0 there; without 1, A leads by 3.5 : 3 with 1; without 2, A by 3 : 1 with 3."""
    scores = {"A": {"x": {"0": 5.0, "1": 1.0, "2": 3.0}}, "B": {"x": {"0": 0.0, "1": 2.0, "2": 6.0}}}
    best = cross_fitted(scores)
    assert best is not None
    assert (best.method, best.score) == ("A", pytest.approx((0 + 1 + 3) / 3))


def test_units_that_some_method_lacks_are_left_out() -> None:
    lacking = {"A": {"x": {"0": 1.0, "1": 2.0, "2": 9.0}}, "B": {"x": {"0": 2.0, "1": 3.0}, "y": {"0": 1.0}}}
    nan = {"A": {"x": {"0": 1.0, "1": 2.0, "2": 9.0}}, "B": {"x": {"0": 2.0, "1": 3.0, "2": NAN}}}
    for scores in (lacking, nan):
        best = cross_fitted(scores)
        assert best is not None
        assert (best.method, best.score) == ("B", 2.5)


def test_too_few_units() -> None:
    single = {"A": {"x": {"0": 1.0}}, "B": {"x": {"0": 2.0}}}
    best = cross_fitted(single)
    assert best is not None
    assert best.method == "B"
    assert all(map(math.isnan, (best.score, best.low, best.high)))
    assert not_beaten(single) == ["A", "B"], "nothing can be tested"
    places = {"A": {"x": {"0": 1.0}, "y": {"0": 5.0}}, "B": {"x": {"0": 2.0}, "y": {"0": 3.0}}}
    best = cross_fitted(places)
    assert best is not None
    assert (best.method, best.score) == ("A", (1 + 3) / 2), "chosen at the other place"
    assert cross_fitted({"A": {"x": {"0": 1.0}}, "B": {"x": {"1": 1.0}}}) is None
    assert cross_fitted({}) is None
    assert not_beaten({"A": {"x": {"0": 1.0}}}) == ["A"]
    assert not_beaten({}) == []


def test_one_test_set_makes_the_set_larger() -> None:
    """The gap is clear for these test samples; resamples of them say that others could reverse it."""
    scores = {"A": {"x": {"0": 0.6, "1": 0.61, "2": 0.6}}, "B": {"x": {"0": 0.5, "1": 0.5, "2": 0.5}}}
    draws = 0.1 * np.random.default_rng(0).normal(size=200)
    resamples = {"A": {"x": dict.fromkeys("012", 0.6 + draws)}, "B": {"x": dict.fromkeys("012", 0.5 + 0 * draws)}}
    assert not_beaten(scores) == ["A"]
    assert not_beaten(scores, resamples) == ["A", "B"]
    fresh, fixed = cross_fitted(scores), cross_fitted(scores, resamples)
    assert fresh is not None
    assert fixed is not None
    assert fixed.high - fixed.low > fresh.high - fresh.low
