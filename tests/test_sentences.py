"""The sentences of a comparison, each from made-up numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedmllm.report.protocol import Comparison, compare
from fedmllm.report.sentences import best_set, conclusion, p_value, points, remarks

CLEAR = Comparison(
    0.021, 0.005, 0.037, 0.012, 0.0078, 16, 0.024, 0.034, units=20, places=4, dropped=0, lost=(), worst=-0.01, dominant=None,
    common=0,
)  # fmt: skip
OPEN = replace(CLEAR, estimate=0.004, low=-0.012, high=0.02, p=0.6, margin=0.017)


@pytest.mark.parametrize(
    ("comparison", "p", "declared", "sentence"),
    [
        (CLEAR, 0.024, None, "FedX is above BASE by 2.1 points [0.5, 3.7] over 4 settings, 20 replicates (p = 0.024)."),
        (
            replace(CLEAR, estimate=-0.021, low=-0.037, high=-0.005, units=1, places=1),
            0.0001, 0.01,
            "FedX is below BASE by 2.1 points [0.5, 3.7] over 1 setting, 1 replicate (p < 0.001).",
        ),
        (
            OPEN, 1.0, 0.02,
            "FedX against BASE: no effect larger than ±2.0 points (two one-sided tests, 5 %); one of 2.4 would have been found "
            "with a probability of 80 %.",
        ),
        (
            replace(CLEAR, margin=0.04), 0.024, 0.04,
            "FedX is above BASE by 2.1 points [0.5, 3.7] over 4 settings, 20 replicates (p = 0.024). FedX against BASE: no "
            "effect larger than ±4.0 points (two one-sided tests, 5 %); one of 2.4 would have been found with a "
            "probability of 80 %.",
        ),
        (
            OPEN, 1.0, 0.01,
            "FedX against BASE is undecided (p = 1.000): effects from -1.2 to +2.0 points fit; only 2.4 or more would be found "
            "with a probability of 80 %.",
        ),
        (
            CLEAR, 0.06, None,
            "FedX against BASE is undecided (p = 0.060): effects from +0.5 to +3.7 points fit; only 2.4 or more would be found "
            "with a probability of 80 %.",
        ),
    ],
)  # fmt: skip
def test_conclusions(comparison: Comparison, p: float, declared: float | None, sentence: str) -> None:
    assert conclusion(comparison, "FedX", "BASE", p, declared) == sentence


@pytest.mark.parametrize(
    ("ours", "baseline", "sentence"),
    [
        ({}, {"A": {"0": 0.5}}, "FedX and BASE have no replicate in common."),
        (
            {"A": {"0": 0.6}}, {"A": {"0": 0.5}},
            "FedX against BASE: +10.0 points in 1 replicate; no test: a test needs two replicates at each place.",
        ),
        (
            {"A": {"0": 0.7, "1": 0.4}}, {"A": {"0": 0.6, "1": 0.3}},
            "FedX against BASE: +10.0 points in 2 replicates; no test: all replicates have the same difference.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_tested(ours: dict[str, dict[str, float]], baseline: dict[str, dict[str, float]], sentence: str) -> None:
    comparison = compare(ours, baseline)
    assert conclusion(comparison, "FedX", "BASE", comparison.p, 0.5) == sentence


def test_a_test_set_whose_luck_is_unknown_is_named_as_the_reason() -> None:
    """The replicates are enough, but no two resamples of their common test set give all of them a score."""
    comparison = compare({"A": {"0": 0.7, "1": 0.5}}, {"A": {"0": 0.6, "1": 0.3}}, c=math.nan)
    assert conclusion(comparison, "FedX", "BASE", comparison.p) == (
        "FedX against BASE: +15.0 points in 2 replicates; no test: fewer than two resamples of the common test set give every "
        "replicate a score."
    )


def test_remarks() -> None:
    assert remarks(CLEAR, "FedX", "BASE") == []
    troubled = replace(CLEAR, dropped=1, lost=("α = 0.5", "α = 1"), dominant="p = 0.8")
    assert remarks(troubled, "FedX", "BASE") == [
        "Left out: 1 replicate that FedX or BASE lacks.",
        "Without a common replicate: α = 0.5, α = 1.",
        "Over half of the variance comes from p = 0.8.",
    ]


def test_numbers() -> None:
    assert [points(x) for x in (0.1234, -0.05, -0.0004, 0.0, math.nan)] == ["+12.3", "-5.0", "+0.0", "+0.0", "–"]
    assert points(0.02, "") == "2.0"
    assert [p_value(p) for p in (0.00099, 0.001, 0.0504)] == ["p < 0.001", "p = 0.001", "p = 0.050"]
    assert best_set(["A", "B"]) == "Not beaten by any other: A, B."
