"""Paired tests: by hand, against naive implementations, and with the error rate that they promise."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.evaluation.metrics import auc, macro_f1
from fedmllm.report.paired_tests import Answered, holm, paired, sign_flip
from helpers import quick

probabilities = st.lists(st.floats(0, 1), max_size=12)


def answers(text: str, score: list[float] | None = None) -> Answered:
    return Answered(np.array(list(text)), np.array(score if score is not None else [0.5] * len(text)))


def exact(metric: str, truth: str, pairs: list[tuple[str, str]]) -> tuple[float, float]:
    """(difference, p) by enumerating all exchanges, with the library's own metric."""
    t = np.array(list(truth))

    def score(predicted: np.ndarray) -> float:
        return macro_f1(t, predicted) if metric == "macro_f1" else float(np.mean(predicted == t))

    def difference(exchange: np.ndarray) -> float:
        gaps = []
        for ours, theirs in pairs:
            a, b = np.array(list(ours)), np.array(list(theirs))
            gaps.append(score(np.where(exchange, b, a)) - score(np.where(exchange, a, b)))
        return float(np.mean(gaps))

    observed = difference(np.zeros(len(truth), dtype=bool))
    exchanged = [difference(np.array(mask, dtype=bool)) for mask in product((0, 1), repeat=len(truth))]
    return observed, float(np.mean([abs(d) >= abs(observed) - 1e-12 for d in exchanged]))


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
@pytest.mark.parametrize(
    ("truth", "pairs"),
    [
        ("aabbccab", [("aabbccab", "bbaaccba")]),
        ("aabbccab", [("aabbccaa", "aabbacab"), ("abbbccab", "abbbbcab")]),
        ("aaabbbcc", [("aaabbbcc", "aaabbbcc")]),
        ("aabb", [("aaab", "cccc")]),
        ("aabbc", [("aaa?c", "?abbc")]),
    ],
)
def test_the_randomisation_test_agrees_with_enumeration(metric: str, truth: str, pairs: list[tuple[str, str]]) -> None:
    found = paired(metric, np.array(list(truth)), None, [(answers(a), answers(b)) for a, b in pairs], seed=0)
    difference, p = exact(metric, truth, pairs)
    assert found.difference == pytest.approx(difference)
    assert found.p == pytest.approx(p, abs=0.025)  # five standard deviations of 10,000 draws
    assert found.low - 1e-12 <= found.difference <= found.high + 1e-12


def test_the_bootstrap_of_f1_agrees_with_the_metric() -> None:
    from fedmllm.evaluation.intervals import percentile_interval, resamples

    rng = np.random.default_rng(0)
    truth, a, b = (rng.choice(list("abc"), 30) for _ in range(3))
    found = paired("macro_f1", truth, None, [(answers("".join(a)), answers("".join(b)))], seed=5)
    naive = [macro_f1(truth[d], a[d]) - macro_f1(truth[d], b[d]) for d in resamples(30, 1000, 5)]
    assert [found.low, found.high] == pytest.approx(percentile_interval(np.array(naive)))


def test_delong_by_hand() -> None:
    """Positives at 0.8, 0.4, negatives at 0.5, 0.1: placements 1, ½ and ½, 1; AUC 0.75. Theirs are all tied: ½ each.

    Differences: positives ½, 0; negatives 0, ½; mean ¼, sample variance ⅛ each, so the variance is ⅛/2 + ⅛/2 = ⅛.
    """
    truth = np.array(list("yynn"))
    found = paired("auc", truth, "y", [(answers("yynn", [0.8, 0.4, 0.5, 0.1]), answers("yynn"))], seed=0)
    assert found.difference == pytest.approx(0.25)
    assert found.high - found.difference == pytest.approx(1.95996 * 0.125**0.5, rel=1e-4)
    assert found.p == pytest.approx(math.erfc(0.25 / 0.125**0.5 / 2**0.5))


def test_delong_leaves_out_samples_without_a_score() -> None:
    nan, truth = math.nan, np.array(list("yoynn"))
    found = paired(
        "auc", truth, "y", [(answers("yoynn", [0.8, nan, 0.4, 0.5, 0.1]), answers("yoynn", [0.5, nan, 0.5, 0.5, 0.5]))], 0
    )
    assert found == paired("auc", np.array(list("yynn")), "y", [(answers("yynn", [0.8, 0.4, 0.5, 0.1]), answers("yynn"))], 0)
    broken = paired("auc", truth, "y", [(answers("yoynn", [0.8, nan, nan, 0.5, 0.1]), answers("yoynn"))], 0)
    assert math.isnan(broken.p), "a score that only one side lacks is an error"


def test_delong_without_variance_has_the_least_p_of_the_other_tests() -> None:
    truth = np.array(list("yynn"))
    alike, perfect = answers("yynn"), answers("yynn", [0.9, 0.8, 0.2, 0.1])
    assert paired("auc", truth, "y", [(perfect, alike)], seed=0).p == 1 / 10001
    assert paired("auc", truth, "y", [(perfect, perfect)], seed=0).p == 1


@quick
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 4)), min_size=4, max_size=30))
def test_delongs_difference_is_the_difference_of_the_aucs(rows: list[tuple[bool, int, int]]) -> None:
    truth = np.array(["y" if positive else "n" for positive, _, _ in rows])
    ours, theirs = [float(a) for _, a, _ in rows], [float(b) for _, _, b in rows]
    found = paired("auc", truth, "y", [(answers("".join(truth), ours), answers("".join(truth), theirs))], seed=0)
    if min(sum(truth == "y"), sum(truth == "n")) < 2:
        assert math.isnan(found.difference)
        return
    assert found.difference == pytest.approx(auc(truth == "y", ours) - auc(truth == "y", theirs))
    assert 0 <= found.p <= 1


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "auc"])
def test_under_no_difference_one_test_in_twenty_is_significant(metric: str) -> None:
    rng, significant, trials = np.random.default_rng(1), 0, 120
    for _ in range(trials):
        truth = rng.choice(["n", "y"], 60)
        sides = []
        for _ in range(2):
            right = rng.random(60) < 0.7
            score = rng.normal(size=60) + (truth == "y")
            sides.append(Answered(np.where(right, truth, np.where(truth == "y", "n", "y")), score))
        significant += paired(metric, truth, "y", [(sides[0], sides[1])], seed=0).p < 0.05
    assert significant / trials < 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


def test_a_clear_difference_is_significant_and_changes_sign_with_the_sides() -> None:
    truth = np.array(list("ab" * 40))
    good, bad = answers("ab" * 40), answers("a" * 80)
    forward, backward = (paired("accuracy", truth, None, [pair], seed=0) for pair in ((good, bad), (bad, good)))
    assert forward.p == backward.p == 1 / 10001
    assert forward.difference == -backward.difference == 0.5
    assert forward.low > 0.3


def test_an_unknown_metric_has_no_test() -> None:
    with pytest.raises(ValueError, match="no paired test for the metric 'bleu'"):
        paired("bleu", np.array(["a"]), None, [], seed=0)


def test_sign_flips_by_hand() -> None:
    # Of the 2³ assignments of signs to 1, 2, 3, only +++ and −−− reach an absolute sum of 6.
    assert sign_flip([1, 2, 3], seed=0) == 2 / 8
    # |1 − 2 + 3| = 2 is reached by all except ±(1 + 2 − 3): 6 of 8.
    assert sign_flip([1, -2, 3], seed=0) == 6 / 8
    assert sign_flip([0, 0], seed=0) == 1
    assert math.isnan(sign_flip([], seed=0))


def test_many_units_are_drawn_and_agree_with_the_exact_test() -> None:
    values = list(np.random.default_rng(3).normal(0.3, 1, 14))
    assert sign_flip([*values, 0.0], seed=0) == pytest.approx(sign_flip(values, seed=0), abs=0.02)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.04: times 3, 2, 1 gives 0.03, 0.04, 0.04.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    corrected = holm([math.nan, 0.03])
    assert math.isnan(corrected[0])
    assert corrected[1] == 0.03


@quick
@given(probabilities)
def test_holm_keeps_the_order_and_only_raises(ps: list[float]) -> None:
    corrected = holm(ps)
    assert all(p <= c <= min(1, len(ps) * p) for p, c in zip(ps, corrected, strict=True))
    order = np.argsort(ps, kind="stable")
    assert all(corrected[a] <= corrected[b] for a, b in pairwise(order))
