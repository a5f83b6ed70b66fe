"""Linear contrasts and verdicts: against SciPy's tests, by hand, and by simulation of each kind of claim (fixed seeds)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from fedmllm.report.contrasts import Contrast, Judgement, estimate, judge
from fedmllm.report.hypothesis_file import Above, Kind, Lowest, Order, Share, Trend
from fedmllm.report.protocol import Comparison, Units, common_term, compare, regrouped, summary

Array = np.ndarray
NAN = math.nan


def units(values: Sequence[float] | Array) -> dict[str, float]:
    return {str(number): float(value) for number, value in enumerate(values)}


def of(**places: Sequence[float] | Array) -> Units:
    return {place: units(values) for place, values in places.items()}


# The estimate


@pytest.mark.parametrize("counts", [(3, 3), (2, 6)])
def test_a_difference_of_cells_is_the_comparison_of_the_protocol(counts: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    scores = {name: of(A=rng.normal(size=counts[0]), B=rng.normal(size=counts[1])) for name in ("ours", "base")}
    contrast = Contrast("", {"ours": 1, "base": -1}, {"A": 0.5, "B": 0.5})
    assert estimate(contrast, scores) == compare(scores["ours"], scores["base"])


def test_one_place_is_the_paired_t_test_of_weighted_cells() -> None:
    rng = np.random.default_rng(1)
    a, b, c = rng.normal(size=(3, 7))
    ours = estimate(
        Contrast("", {"a": 1, "b": -0.9, "c": -0.1}, {"A": 1}),
        {name: of(A=x) for name, x in zip("abc", (a, b, c), strict=True)},
    )
    expected = stats.ttest_1samp(a - 0.9 * b - 0.1 * c, 0)
    assert (ours.p, ours.df, ours.worst) == pytest.approx((expected.pvalue, 6, min(a - 0.9 * b - 0.1 * c)))
    assert (ours.low, ours.high) == pytest.approx(tuple(expected.confidence_interval()))


@pytest.mark.parametrize("counts", [(2, 2), (3, 8)])
def test_one_place_against_another_is_welchs_test(counts: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    high, low = rng.normal(1, 1, counts[0]), rng.normal(0, 3, counts[1])
    ours = estimate(Contrast("", {"": 1}, {"high": 1, "low": -1}), {"": of(high=high, low=low)})
    expected = stats.ttest_ind(high, low, equal_var=False)
    assert (ours.estimate, ours.p, ours.df) == pytest.approx((high.mean() - low.mean(), expected.pvalue, expected.df))
    assert (ours.low, ours.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert ours.worst == pytest.approx(min(high) - low.mean())


def test_a_contrast_of_four_places_by_hand() -> None:
    """Weights −1, −1/3, 1/3, 1 of places with the variances 1, 4, 1, 9 of their 3, 3, 2, 2 replicates."""
    places = {"A": [0, 1, 2], "B": [1, 3, 5], "C": [4 - 0.5**0.5, 4 + 0.5**0.5], "D": [9 - 4.5**0.5, 9 + 4.5**0.5]}
    weights = {"A": -1, "B": -1 / 3, "C": 1 / 3, "D": 1}
    ours = estimate(Contrast("", {"x": 1}, weights), {"x": of(**places)})
    parts = [1 / 3, 4 / 3 / 9, 1 / 2 / 9, 9 / 2]
    assert ours.estimate == pytest.approx(-1 - 1 + 4 / 3 + 9)
    assert ours.se**2 == pytest.approx(sum(parts))
    assert ours.df == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 2 + parts[2] ** 2 + parts[3] ** 2))
    lowest = min(*places["C"], *places["D"])
    assert ours.worst == pytest.approx(lowest * 4 / 3 - 1 - 1), "as if C and D had scored like their worst replicate"


def test_places_with_the_same_draws_are_paired() -> None:
    rng = np.random.default_rng(3)
    high, low = rng.normal(size=(2, 6))
    contrast = Contrast("", {"": 1}, {"high": 1, "low": -1})
    ours = estimate(contrast, {"": of(high=high, low=low)}, averaged=True)
    expected = stats.ttest_rel(high, low)
    assert (ours.estimate, ours.p, ours.df) == pytest.approx((np.mean(high - low), expected.pvalue, 5))
    assert ours.worst == pytest.approx(min(high - low))


@pytest.mark.parametrize("averaged", [False, True])
def test_one_test_set_adds_the_variance_that_it_has_in_the_contrast(averaged: bool) -> None:
    rng = np.random.default_rng(4)
    scores = {"": of(high=rng.normal(size=3), low=rng.normal(size=3))}
    drawn = {place: {str(i): rng.normal(size=50) for i in range(3)} for place in ("high", "low")}
    ours = estimate(Contrast("", {"": 1}, {"high": 1, "low": -1}), scores, {"": drawn}, averaged)
    signed = {"high": {u: 2 * x for u, x in drawn["high"].items()}, "low": {u: -2 * x for u, x in drawn["low"].items()}}
    assert ours.common == pytest.approx(common_term(regrouped(signed, ["high", "low"]) if averaged else signed))


def test_without_replicates_a_contrast_of_places_has_no_interval() -> None:
    """With equal weights the places are the units, as in the protocol; with other weights they are not alike."""
    scores = {"": of(A=[1.0, 2.0], B=[3.0])}
    equal = estimate(Contrast("", {"": 1}, {"A": 0.5, "B": 0.5}), scores)
    assert equal == summary(scores[""])
    assert equal.df == 1
    unequal = estimate(Contrast("", {"": 1}, {"A": -1, "B": 1}), scores)
    assert (unequal.estimate, unequal.units, unequal.worst) == (1.5, 3, 1.5)
    assert all(map(math.isnan, [unequal.low, unequal.high, unequal.p, unequal.mde, unequal.margin]))
    lost = estimate(Contrast("", {"": 1}, {"A": -1, "B": 1}), {"": of(A=[1.0, 2.0], B=[NAN])})
    assert lost.lost == ("B",)


# Verdicts


def result(estimate: float, se: float, df: float = 9) -> Comparison:
    low, high = stats.t.interval(0.95, df, estimate, se)
    margin = max(map(abs, stats.t.interval(0.9, df, estimate, se)))
    p = 2 * stats.t.sf(abs(estimate / se), df)
    return Comparison(estimate, low, high, p, se, df, 3 * se, margin, 10, 1, 0, (), estimate - se, None, 0)


CLEAR, OPPOSITE, NEAR_ZERO, NARROW = result(0.03, 0.01), result(-0.03, 0.01), result(0.001, 0.015), result(0.001, 0.001)


@pytest.mark.parametrize(
    ("contrasts", "verdict", "weakest", "small"),
    [
        ([CLEAR], "supported", 0, False),
        ([OPPOSITE], "refuted", 0, False),
        ([NEAR_ZERO], "undecided", 0, False),
        ([NARROW], "no effect", 0, True),
        ([result(0.01, 0.001)], "supported", 0, True),
        ([result(-0.01, 0.001)], "refuted", 0, True),
        ([result(0.0225, 0.01)], "undecided", 0, False),  # t = 2.25 of the 2.26 that 5 % needs
        ([result(0.0227, 0.01)], "supported", 0, False),
        ([CLEAR, result(0.04, 0.01)], "supported", 0, False),
        ([CLEAR, NEAR_ZERO], "undecided", 1, False),
        ([OPPOSITE, CLEAR], "refuted", 0, False),
        ([result(-0.0227, 0.01), CLEAR], "undecided", 0, False),  # one of two is below zero at 5 %, but not at 5 %/2
        ([NARROW, NARROW], "no effect", 0, True),
        ([NARROW, NEAR_ZERO], "undecided", 1, False),
        ([CLEAR, replace(CLEAR, p=NAN)], "undecided", 1, False),
    ],
)
def test_verdicts(contrasts: list[Comparison], verdict: str, weakest: int, small: bool) -> None:
    judgement = judge(contrasts, 0.02)
    assert (judgement.verdict, judgement.weakest, judgement.small) == (verdict, weakest, small)


def test_a_single_contrast_keeps_its_p() -> None:
    for comparison in (CLEAR, OPPOSITE, NEAR_ZERO):
        assert judge([comparison], 0.02).p == pytest.approx(comparison.p)
    assert judge([CLEAR, OPPOSITE], 0.02).p == pytest.approx(2 * OPPOSITE.p), "refuted by one of two"
    assert judge([CLEAR, result(0.05, 0.01)], 0.02).p == pytest.approx(CLEAR.p), "supported by the weakest"


# Error rates of each kind of claim, at the edge of what it says

PLACES = {name: {"place": name} for name in ("A", "B", "C")}
ABOVE = Above(axis="method", higher=("a", "b"), lower=("c", "d"))
TREND = Trend(axis="method", higher=("a",), lower=("b",), over="place", values=({"A": 0.3, "B": 0.4, "C": 0.7},))
LOWEST = Lowest(axis="method", cell="a", others=("b", "c", "d"))
SHARE = Share(axis="method", cell="b", start="a", end="c", at_least=0.9)
ORDER = Order(axis="place", ascending=(("A",), ("B",), ("C",)))
KINDS = {"above": ABOVE, "trend": TREND, "lowest": LOWEST, "share": SHARE, "order": ORDER}
MEANS: dict[str, dict[str, tuple[float, float, float]]] = {
    # cell -> its mean at each place
    "above": {"a": (3, 1, 0), "b": (0, 0, 0), "c": (2, 0, 1), "d": (1, 0, 0)},
    "trend": {"a": (2, 2, 2), "b": (1, 1, 1)},
    "lowest": {"a": (0, 0, 0), "b": (1, 0, -1), "c": (9, 9, 9), "d": (9, 9, 9)},  # b is as low as a
    "share": {"a": (0, 0, 0), "b": (9, 9, 9), "c": (10, 10, 10)},
    "order": {"": (0, 9, 9)},
}


def judged(kind: str, repetitions: int, replicates: int = 5) -> list[Judgement]:
    """Verdicts on a claim at its edge; cells share a part of each replicate, and places differ in their spread."""
    rng, contrasts = np.random.default_rng(7), KINDS[kind].contrasts(PLACES)
    judgements = []
    for _ in range(repetitions):
        noise = rng.normal(size=(len(MEANS[kind]), 3, replicates)) * [[[1.0], [0.5], [0.2]]]
        noise += rng.normal(size=(3, replicates))
        scores = {
            cell: {place: units(mean + noise[number, at]) for at, (place, mean) in enumerate(zip("ABC", means, strict=True))}
            for number, (cell, means) in enumerate(MEANS[kind].items())
        }
        judgements.append(judge([estimate(contrast, scores) for contrast in contrasts], 0.0))
    return judgements


@pytest.mark.parametrize("kind", KINDS)
def test_a_claim_at_its_edge_is_decided_in_one_case_of_twenty(kind: str) -> None:
    """Claims of several parts are decided less often: support costs 2.5 %, refutation a share of 2.5 %."""
    verdicts = [judgement.verdict for judgement in judged(kind, 700)]
    supported, refuted = (verdicts.count(verdict) / len(verdicts) for verdict in ("supported", "refuted"))
    assert 0.02 <= supported + refuted <= 0.07
    assert supported <= 0.045
    assert refuted <= 0.045


def test_an_effect_of_the_margin_is_seldom_called_none() -> None:
    rng, wrong = np.random.default_rng(8), 0
    for _ in range(1000):
        compared = estimate(Contrast("", {"x": 1}, {"A": 1}), {"x": of(A=rng.normal(1, 1, 12))})
        wrong += judge([compared], 1.0).small
    assert 20 <= wrong <= 70


def test_weights_of_a_trend() -> None:
    (contrast,) = TREND.contrasts(PLACES)
    numbers, gains = np.array([0.3, 0.4, 0.7]), np.array([1.0, 4.0, 2.0])
    assert contrast.cells == {"a": 1, "b": -1}
    slope = stats.linregress(numbers, gains).slope
    assert sum(contrast.places[place] * gain for place, gain in zip("ABC", gains, strict=True)) == pytest.approx(0.4 * slope)


def test_a_trend_of_two_tables_has_one_slope_and_two_levels() -> None:
    """As least squares with a column for each table."""
    kind = Trend(axis="m", higher=("a",), lower=("b",), over="place", values=({"A": 0, "B": 1, "C": 3}, {"D": 0, "E": 1}))
    places = {name: {"place": name} for name in "ABCDE"}
    (contrast,) = kind.contrasts(places)
    design = np.array([[0, 1, 3, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=float).T
    gains = np.array([1.0, 4.0, 2.0, 7.0, 9.0])
    slope = np.linalg.lstsq(design, gains, rcond=None)[0][0]
    assert sum(contrast.places[place] * gain for place, gain in zip("ABCDE", gains, strict=True)) == pytest.approx(3 * slope)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_weights_sum_to_nothing_where_a_claim_is_about_differences(kind: Kind) -> None:
    for contrast in kind.contrasts(PLACES):
        total = sum(contrast.cells.values()) * sum(contrast.places.values())
        assert total == pytest.approx(0, abs=1e-12), contrast.label
