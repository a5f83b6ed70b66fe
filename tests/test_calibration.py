"""The calibration of probabilities, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.evaluation.calibration import BINS, calibration
from helpers import quick

CASES: list[tuple[str, list[list[float]], list[int], float, float]] = [
    ("certain and right", [[1.0, 0.0], [0.0, 1.0]], [0, 1], 0.0, 0.0),
    ("certain and wrong", [[1.0, 0.0], [0.0, 1.0]], [1, 0], 1.0, 2.0),
    ("80 % sure, right four times in five", [[0.8, 0.2]] * 5, [0, 0, 0, 0, 1], 0.0, (4 * 0.08 + 1.28) / 5),
    ("90 % sure, always wrong", [[0.9, 0.1]] * 3, [1, 1, 1], 0.9, 1.62),
    ("too modest here, too sure there", [[0.6, 0.4], [0.05, 0.95]], [0, 0], 0.5 * 0.4 + 0.5 * 0.95, 1.0625),
    ("errors of one bin cancel", [[0.81, 0.19], [0.85, 0.15]], [0, 1], abs(0.5 - 0.83), (2 * 0.19**2 + 2 * 0.85**2) / 2),
    ("three options", [[0.5, 0.3, 0.2]], [1], 0.5, 0.25 + 0.49 + 0.04),
]  # fmt: skip


@pytest.mark.parametrize(("probabilities", "right", "ece", "brier"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_by_hand(probabilities: list[list[float]], right: list[int], ece: float, brier: float) -> None:
    found = calibration(probabilities, right)
    assert (found.ece, found.brier) == (pytest.approx(ece), pytest.approx(brier))


def test_bins_are_closed_above() -> None:
    found = calibration([[0.2] * 5, [0.21, 0.2, 0.2, 0.2, 0.19], [1.0, 0, 0, 0, 0]], [0, 1, 0])
    assert {i: b.n for i, b in enumerate(found.bins) if b.n} == {2: 1, 3: 1, 14: 1}
    assert (found.bins[3].confidence, found.bins[3].accuracy) == (pytest.approx(0.21), 0.0)
    assert np.isnan(found.bins[0].accuracy)
    with pytest.raises(ValueError, match="at least one question"):
        calibration([], [])


@quick
@given(st.lists(st.tuples(st.lists(st.floats(0.01, 1), min_size=2, max_size=4), st.integers(0, 1)), min_size=1, max_size=30))
def test_bounds_and_order(questions: Sequence[tuple[list[float], int]]) -> None:
    probabilities = [[p / sum(options) for p in options] for options, _ in questions]
    found = calibration(probabilities, [right for _, right in questions])
    assert 0 <= found.ece <= 1
    assert 0 <= found.brier <= 2
    assert (len(found.bins), sum(b.n for b in found.bins)) == (BINS, len(questions))
    gap = abs(
        np.mean([max(p) for p in probabilities])
        - np.mean([np.argmax(p) == r for p, (_, r) in zip(probabilities, questions, strict=True)])
    )
    assert found.ece >= gap - 1e-9, "bins can only add to the error of the whole"
    backwards = calibration(probabilities[::-1], [right for _, right in questions[::-1]])
    assert (backwards.ece, backwards.brier) == (pytest.approx(found.ece), pytest.approx(found.brier))
