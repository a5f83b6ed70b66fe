"""The scores that clients can expect, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedmllm.data.manifest import Holding, Manifest
from fedmllm.evaluation.clients import client_scores, fairness

BOTH, IMAGE, TEXT, NONE = frozenset({"image", "text"}), frozenset({"image"}), frozenset({"text"}), frozenset[Any]()
METRICS = {"both": {"auc": 0.9}, "image": {"auc": 0.5}, "text": {"auc": 0.7}}


def manifest(*clients: list[frozenset[Any]], extra: int = 0) -> Manifest:
    rows = [Holding(f"s{c}-{i}", c, seen) for c, held in enumerate(clients) for i, seen in enumerate(held)]
    return Manifest.of(rows, len(clients) + extra)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"client": c} for c in range(count)]


def test_patterns_are_counted_per_client() -> None:
    counts = manifest([BOTH, BOTH, IMAGE], [TEXT, NONE], extra=1).patterns()
    assert np.array_equal(counts, [[2, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])


def test_a_score_is_weighted_by_the_patterns_that_the_client_sees() -> None:
    held = manifest([BOTH] * 3 + [IMAGE], [TEXT, NONE], [NONE], extra=1)
    table = rows(4)
    assert client_scores(held, METRICS, table, "auc") == pytest.approx([0.75 * 0.9 + 0.25 * 0.5, 0.7])
    assert [row.get("score") for row in table] == [0.8, 0.7, None, None], "clients without visible samples have no score"


def test_a_personal_model_replaces_the_global_one() -> None:
    table = rows(3)
    table[1]["metrics"] = {"both": {"auc": 0.2}}
    assert client_scores(manifest([BOTH], [BOTH], [BOTH]), METRICS, table, "auc") == [0.2]
    assert "score" not in table[0]


@pytest.mark.parametrize("metrics", [{"both": {"auc": 0.9}}, {**METRICS, "text": {"auc": math.nan}}])
def test_there_are_no_scores_if_a_pattern_is_unknown(metrics: dict[str, dict[str, float]]) -> None:
    table = rows(2)
    assert client_scores(manifest([BOTH], [TEXT]), metrics, table, "auc") == []
    assert all("score" not in row for row in table)
    assert fairness([]) == {}


def test_the_row_of_centralised_training_gets_no_score() -> None:
    table = [{"client": 0, "samples": 2}]
    assert client_scores(manifest([BOTH], [TEXT]), METRICS, table, "auc") == [0.9, 0.7]
    assert "score" not in table[0]


def test_fairness_by_hand() -> None:
    # The lowest tenth of 11 scores, rounded up, is two.
    assert fairness([i / 10 for i in range(11)]) == {"n": 11, "mean": 0.5, "sd": round(0.1**0.5, 6), "worst_decile": 0.05}
