"""The protocol of comparison: against SciPy's tests, by simulation (fixed seeds, error rates within stated bands), by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedmllm.errors import ConfigError
from fedmllm.report.protocol import (
    Comparison,
    Units,
    common_term,
    compare,
    holm,
    place_variances,
    regrouped,
    replicates_needed,
    summary,
)
from helpers import quick

Rng = np.random.Generator
Noise = Callable[[Rng, int], np.ndarray]


def normal(rng: Rng, n: int) -> np.ndarray:
    return rng.normal(size=n)


def heavy(rng: Rng, n: int) -> np.ndarray:
    """Tails of Student's t with 3 degrees of freedom, variance 1."""
    return rng.standard_t(3, size=n) / 3**0.5


def units(*places: Sequence[float]) -> dict[str, dict[str, float]]:
    """Units "0", "1", … at places "A", "B", …."""
    return {
        name: {str(i): float(x) for i, x in enumerate(values)} for name, values in zip("ABCDEFGHIJKL", places, strict=False)
    }


def simulated(
    repetitions: int,
    counts: Sequence[int],
    *,
    effect: float = 0.0,
    sds: Sequence[float] = (),
    noise: Noise = normal,
    seed: int = 0,
) -> list[Comparison]:
    """Comparisons of a method that is better by `effect` on average over places, and by other amounts at each of them.

    `sds` (P,) are those of the differences. Scores also have parts that both methods share: of the place, and of the unit.
    """
    rng, comparisons = np.random.default_rng(seed), []
    own = np.linspace(-0.05, 0.05, len(counts)) if len(counts) > 1 else np.zeros(1)
    for _ in range(repetitions):
        ours, baseline = [], []
        for count, sd, place in zip(counts, sds or [0.03] * len(counts), own, strict=True):
            shared = 0.6 + place + 0.1 * rng.normal(size=count)
            baseline.append(shared + 0.5**0.5 * sd * noise(rng, count))
            ours.append(shared + effect + place + 0.5**0.5 * sd * noise(rng, count))
        comparisons.append(compare(units(*ours), units(*baseline)))
    return comparisons


def share(happened: Sequence[bool]) -> float:
    return float(np.mean(happened))


# Against SciPy


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_one_place_is_the_paired_t_test(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.62, 0.05, n), rng.normal(0.6, 0.05, n)
    ours, scipy_test = compare(units(a), units(b)), stats.ttest_1samp(a - b, 0)
    assert (ours.p, ours.df) == pytest.approx((scipy_test.pvalue, n - 1))
    assert (ours.low, ours.high) == pytest.approx(tuple(scipy_test.confidence_interval(0.95)))
    assert ours.margin == pytest.approx(max(map(abs, scipy_test.confidence_interval(0.9))))
    assert ours.mde == pytest.approx((stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) * stats.sem(a - b))
    assert (ours.worst, ours.dominant, ours.common) == (pytest.approx(min(a - b)), None, 0)
    assert compare(units(b), units(a)).p == pytest.approx(ours.p)


@pytest.mark.parametrize("counts", [(2, 2), (3, 8), (5, 5)])
def test_two_places_are_welchs_test(counts: tuple[int, int]) -> None:
    """The mean of two places is zero where the first equals minus the second."""
    rng = np.random.default_rng(sum(counts))
    first, second = rng.normal(0.02, 0.03, counts[0]), rng.normal(0.01, 0.1, counts[1])
    welch = stats.ttest_ind(first, -second, equal_var=False)
    ours = summary(units(first, second))
    assert (ours.p, ours.df) == pytest.approx((welch.pvalue, welch.df))
    assert 2 * np.array([ours.low, ours.high]) == pytest.approx(np.array(welch.confidence_interval(0.95)))


# By simulation

DESIGNS = [
    pytest.param([3], (), normal, id="one place of 3"),
    pytest.param([3] * 4, (), normal, id="R = 3"),
    pytest.param([5] * 6, (), normal, id="R = 5"),
    pytest.param([5] * 4, (), heavy, id="R = 5, heavy tails"),
    pytest.param([3] * 4, (), heavy, id="R = 3, heavy tails"),
    pytest.param([3, 4, 5, 8], (0.09, 0.05, 0.02, 0.01), normal, id="unequal R and spread"),
    pytest.param([3, 4, 5, 8], (0.02, 0.03, 0.04, 0.05), heavy, id="unequal R, heavy tails"),
]


@pytest.mark.parametrize(("counts", "sds", "noise"), DESIGNS)
def test_without_a_difference_one_test_in_twenty_is_significant(counts: list[int], sds: list[float], noise: Noise) -> None:
    assert 0.02 <= share([c.p < 0.05 for c in simulated(1000, counts, sds=sds, noise=noise)]) <= 0.07


@pytest.mark.parametrize(("counts", "sds", "noise"), DESIGNS[1::2])
def test_the_interval_holds_the_difference(counts: list[int], sds: list[float], noise: Noise) -> None:
    comparisons = simulated(700, counts, effect=0.03, sds=sds, noise=noise, seed=1)
    assert 0.93 <= share([c.low <= 0.03 <= c.high for c in comparisons]) <= 0.98


@pytest.mark.parametrize(("sds", "effect"), [([0.03], 0.02), ([0.06, 0.03, 0.03, 0.02], 0.02), ([0.03] * 3, 0.015)])
def test_the_planned_replicates_have_the_planned_power(sds: list[float], effect: float) -> None:
    replicates = replicates_needed([sd**2 for sd in sds], effect)
    comparisons = simulated(1000, [replicates] * len(sds), effect=effect, sds=sds)
    assert 0.75 <= share([c.p < 0.05 for c in comparisons]) <= 0.88


@pytest.mark.parametrize("counts", [[5], [3] * 4, [5] * 4])
def test_a_difference_as_large_as_the_margin_is_seldom_excluded(counts: list[int]) -> None:
    declared = 0.06
    comparisons = simulated(700, counts, effect=declared, sds=[0.02] * len(counts))
    assert share([c.margin <= declared for c in comparisons]) <= 0.07
    assert share([c.margin <= declared for c in simulated(100, counts, sds=[0.02] * len(counts))]) > 0.8, "and can be found"


@pytest.mark.parametrize(("places", "replicates"), [(1, 5), (4, 3)])
def test_one_fixed_test_set(places: int, replicates: int) -> None:
    """200 samples: how much better a method is at a sample is in part the same in all units, in part the unit's own."""
    rng, n = np.random.default_rng(0), 200
    weights = rng.multinomial(n, np.full(n, 1 / n), size=200) / n
    without, corrected = [], []
    for _ in range(400):
        shared = rng.normal(size=n)
        gaps = shared + rng.normal(size=(places * replicates, n)) + 0.02 * rng.normal(size=(places * replicates, 1))
        scores = units(*np.split(gaps.mean(axis=1), places))
        drawn = np.split(gaps @ weights.T, places)
        resampled = {
            place: dict(zip(scores[place], of_place, strict=True)) for place, of_place in zip(scores, drawn, strict=True)
        }
        without.append(summary(scores).p < 0.05)
        corrected.append(summary(scores, common_term(resampled)).p < 0.05)
    assert share(without) > 0.15
    assert share(corrected) <= 0.085


# By hand

NAN = math.nan


def test_the_formulas_by_hand() -> None:
    """A: 0, 2, 4 (mean 2, s² 4, v 4/3). B: 1, 3 (mean 2, s² 2, v 1). V = (4/3 + 1)/4 = 7/12."""
    ours = summary(units([0, 2, 4], [1, 3]))
    assert ours.estimate == 2
    assert ours.se**2 == pytest.approx(7 / 12)
    assert ours.df == pytest.approx((7 / 3) ** 2 / ((4 / 3) ** 2 / 2 + 1))
    assert (ours.units, ours.places, ours.worst, ours.dominant) == (5, 2, 0, "A")
    widened = summary(units([0, 2, 4], [1, 3]), c=7 / 12)
    assert widened.se**2 == pytest.approx(14 / 12)
    assert widened.df == pytest.approx(4 * ours.df)


def test_a_wider_level_widens_the_interval_and_nothing_else() -> None:
    usual, wide = summary(units([0, 2, 4])), summary(units([0, 2, 4]), level=0.99)
    assert wide.high - 2 == pytest.approx(stats.t.ppf(0.995, 2) * usual.se)
    assert (wide.p, wide.mde, wide.margin) == (usual.p, usual.mde, usual.margin)


@pytest.mark.parametrize(
    ("ours", "baseline", "dropped", "lost", "estimate"),
    [
        (units([3, 4, 5]), units([1, 1]), 1, (), 2.5),
        (units([3, NAN, 5]), units([1, 1, 1]), 1, (), 3),
        (units([3, NAN, 5]), units([1, NAN, math.inf]), 2, (), 2),
        (units([3, 4], [1, 2]), units([1, 1]), 2, ("B",), 2.5),
        (units([3, 4]), units([1, 1], [1], []), 1, ("B", "C"), 2.5),
        (units([3, 4], [NAN, NAN]), units([1, 1], [1, 1]), 2, ("B",), 2.5),
        ({"A": {"x": 1.0, "y": 2.0}}, {"A": {"y": 0.5, "z": 9.0}}, 2, (), 1.5),
        ({}, units([1, 2]), 2, ("A",), NAN),
        ({}, {}, 0, (), NAN),
    ],
)
def test_units_that_one_side_lacks(ours: Units, baseline: Units, dropped: int, lost: tuple[str, ...], estimate: float) -> None:
    comparison = compare(ours, baseline)
    assert (comparison.dropped, comparison.lost) == (dropped, lost)
    assert comparison.estimate == pytest.approx(estimate, nan_ok=True)


def test_a_place_of_one_unit_makes_places_the_units() -> None:
    ours, scipy_test = summary(units([1, 3], [4], [9])), stats.ttest_1samp([2, 4, 9], 0)
    assert (ours.estimate, ours.df, ours.p) == pytest.approx((5, 2, scipy_test.pvalue))
    assert (ours.units, ours.places, ours.dominant) == (4, 3, None)


@pytest.mark.parametrize("of", [units([0.3]), units([0.3], [NAN])])
def test_one_unit_is_a_number_alone(of: Units) -> None:
    comparison = summary(of, c=0.1)
    assert (comparison.estimate, comparison.units, comparison.worst) == (0.3, 1, 0.3)
    assert all(map(math.isnan, [comparison.low, comparison.high, comparison.p, comparison.se, comparison.df, comparison.mde]))
    assert math.isnan(comparison.margin)


@pytest.mark.parametrize("gap", [0.0, 0.1])
def test_without_spread_there_is_no_p(gap: float) -> None:
    """0.7 − 0.6 and 0.4 − 0.3 differ by rounding, which is no spread."""
    baseline = units([0.6, 0.3, 0.2], [0.1, 0.7])
    ours = {place: {unit: x + gap for unit, x in of.items()} for place, of in baseline.items()}
    comparison = compare(ours, baseline)
    assert (comparison.estimate, comparison.se) == (pytest.approx(gap), 0)
    assert all(map(math.isnan, [comparison.p, comparison.low, comparison.high, comparison.mde, comparison.margin]))
    assert comparison.dominant is None
    known = compare(ours, baseline, c=0.01)
    assert (known.se, known.high) == pytest.approx((0.1, gap + 1.959964 * 0.1)), "with c alone the test is normal"


def test_a_dominant_place_is_named() -> None:
    assert summary(units([1, 2], [1, 9], [1, 2])).dominant == "B"
    assert summary(units([1, 2], [1, 2], [1, 2])).dominant is None


def test_the_common_term_is_the_mean_covariance_of_two_units() -> None:
    draws = np.random.default_rng(0).normal(size=(4, 200)) + np.random.default_rng(1).normal(size=200)
    between = np.cov(draws)[~np.eye(4, dtype=bool)].mean()
    resampled = {"A": {str(i): row for i, row in enumerate(draws)}}
    assert common_term(resampled) == pytest.approx(between)
    u, w, m = 4, draws.mean(axis=0).var(ddof=1), draws.var(axis=1, ddof=1).mean()
    assert common_term(resampled) == pytest.approx((u * w - m) / (u - 1))
    single = {place: {"0": row} for place, row in zip("ABCD", draws, strict=True)}
    assert common_term(single) == pytest.approx(between), "places of one unit are the units"
    assert common_term(resampled, {"A": {str(i): draws[0] for i in range(4)}}) == pytest.approx(
        np.cov(draws - draws[0])[~np.eye(4, dtype=bool)].mean()
    )


def test_the_common_term_of_places_weights_them_equally() -> None:
    """The covariance of the estimates from two sets of replicates: of places' means, a place's own from pairs within it."""
    draws = np.random.default_rng(0).normal(size=(5, 200)) + np.random.default_rng(1).normal(size=200)
    covariance = np.cov(draws)
    between = covariance[:2, 2:].mean()
    second = covariance[2:, 2:][~np.eye(3, dtype=bool)].mean()
    resampled = {"A": {"0": draws[0], "1": draws[1]}, "B": {str(i): draws[2 + i] for i in range(3)}}
    assert common_term(resampled) == pytest.approx((covariance[0, 1] + second + 2 * between) / 4)


def test_edges_of_the_common_term() -> None:
    rising = np.arange(10.0)
    assert common_term({"A": {"0": rising, "1": -rising}}) == 0, "a negative covariance is none"
    assert common_term({"A": {"0": rising}}) == common_term({}) == 0
    assert math.isnan(common_term({"A": {"0": np.array([1, NAN, NAN]), "1": np.array([NAN, 1, 2])}})), "no resample in common"
    gap = np.where(rising == 3, NAN, rising)
    assert common_term({"A": {"0": rising, "1": gap}}) == pytest.approx(np.delete(rising, 3).var(ddof=1))
    assert common_term({"A": {"0": rising, "1": rising, "2": np.full(10, NAN)}}) == pytest.approx(rising.var(ddof=1))


def test_shared_draws_are_regrouped() -> None:
    scores = {"A": {"s0": 1.0, "s1": 2.0, "s2": 3.0}, "B": {"s0": 3.0, "s1": 6.0}}
    assert regrouped(scores, ["A", "B"]) == {"all places": {"s0": 2, "s1": 4}}
    assert regrouped(scores, ["A"]) == {"all places": {"s0": 1, "s1": 2, "s2": 3}}
    assert regrouped(scores, ["A", "C"]) == regrouped({}, []) == {"all places": {}}
    drawn = regrouped({"A": {"s0": np.array([1.0, 2])}, "B": {"s0": np.array([3.0, 6])}}, ["A", "B"])
    assert drawn["all places"]["s0"].tolist() == [2, 4]


# Planning and Holm


@pytest.mark.parametrize("effect", [0.1, 0.03, 0.01])
@pytest.mark.parametrize("variances", [[1e-3], [1e-3, 2e-3, 1e-5], [4e-4] * 12])
@pytest.mark.parametrize("c", [0.0, 1e-6])
def test_the_planned_replicates_are_the_fewest(variances: list[float], effect: float, c: float) -> None:
    """The MDE of a comparison with those variances is at most the effect with R replicates, and above it with R − 1."""

    def mde(replicates: int) -> float:
        zero_mean = np.resize([-1.0, 1.0], replicates) - np.resize([-1.0, 1.0], replicates).mean()
        standard = zero_mean / zero_mean.std(ddof=1)
        return summary(units(*[standard * variance**0.5 for variance in variances]), c).mde

    replicates = replicates_needed(variances, effect, c=c)
    assert mde(replicates) <= effect
    assert replicates == 2 or mde(replicates - 1) > effect


def test_edges_of_planning() -> None:
    assert replicates_needed([0.0], 0.01) == 2
    assert replicates_needed([1e-3], 0.02, power=0.9) > replicates_needed([1e-3], 0.02)
    for variances, effect, power in (
        ([], 0.1, 0.8),
        ([1.0], 0.0, 0.8),
        ([1.0], NAN, 0.8),
        ([1.0], 0.1, 1.0),
        ([1.0], 0.1, 0.1),
    ):
        with pytest.raises(ConfigError, match="planning needs"):
            replicates_needed(variances, effect, power)
    with pytest.raises(ConfigError, match="no number of replicates finds 2 points on one fixed test set"):
        replicates_needed([1e-3], 0.02, c=1e-4)
    pilot = place_variances(units([1, 2, 3], [1], [5, NAN, 9]), units([0, 0, 0], [0], [0, 0, 0]))
    assert pilot == {"A": pytest.approx(1), "C": pytest.approx(8)}


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.04: times 3, 2, 1 gives 0.03, 0.04, 0.04.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    assert holm([NAN, 0.03]) == pytest.approx([NAN, 0.03], nan_ok=True)


@quick
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_and_only_raises(ps: list[float]) -> None:
    corrected = holm(ps)
    assert all(p <= c <= min(1, len(ps) * p) for p, c in zip(ps, corrected, strict=True))
    order = np.argsort(ps, kind="stable")
    assert all(corrected[a] <= corrected[b] for a, b in pairwise(order))
