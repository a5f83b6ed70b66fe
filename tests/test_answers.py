"""What a run stores for comparisons, computed from predictions and from the lines of older runs alike."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedmllm.evaluation import answers
from fedmllm.evaluation.answers import bootstrap_scores
from fedmllm.evaluation.intervals import resamples
from fedmllm.evaluation.metrics import auc, ones
from fedmllm.evaluation.predictions import Prediction


def row(i: int, truth: str, predicted: str, score: float | None = None) -> dict[str, Any]:
    """A line of `predictions.jsonl` as runs wrote it before options had an index."""
    line = {"pattern": "both", "id": f"s{i:03d}", "answer": truth, "predicted": predicted, "correct": truth == predicted}
    return line | {"closed": True, "failed": False, "score": score, "judged": None}


def rows(seed: int, n: int = 60) -> list[dict[str, Any]]:
    """A model's answers to the same questions; `seed` draws the answers."""
    truth = np.random.default_rng(0).choice(["yes", "no", "no"], n)
    rng = np.random.default_rng(seed)
    predicted = np.where(rng.random(n) < 0.7, truth, rng.choice(["yes", "no"], n))
    scores = rng.random(n) + (predicted == "yes")
    return [row(i, str(truth[i]), str(predicted[i]), float(scores[i])) for i in range(n)]


def test_scores_on_the_common_resamples_by_hand() -> None:
    models, draws = [rows(1), rows(2)], resamples(60, 200, seed=0)
    scores = bootstrap_scores("accuracy", None, models)
    correct = np.mean([[line["correct"] for line in model] for model in models], axis=0)
    assert scores == pytest.approx(correct[draws].mean(axis=1), abs=1e-6)
    assert len(scores) == 200
    assert all(score == round(score, 6) for score in scores)
    ranked = bootstrap_scores("auc", "yes", models[:1], draws=5)
    positive = np.array([line["answer"] == "yes" for line in models[0]])
    values = np.array([line["score"] for line in models[0]])
    assert ranked == pytest.approx([float(auc(ones(60), positive[d], values[d])[0]) for d in draws[:5]], abs=1e-6)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "auc"])
def test_stored_lines_in_any_order_score_as_predictions_do(metric: str) -> None:
    lines = rows(3)
    predictions = [Prediction(**line) for line in lines]
    assert bootstrap_scores(metric, "yes", [lines[::-1]]) == bootstrap_scores(metric, "yes", [predictions])


def test_macro_f1_maps_wrong_answers_to_classes_by_the_rule_of_the_run() -> None:
    truth = ["Yes"] * 10 + ["No"] * 20
    predicted = ["yes"] * 8 + ["no"] * 2 + ["no"] * 18 + ["yes"] * 2
    lines = [row(i, t, p) | {"correct": t.lower() == p} for i, (t, p) in enumerate(zip(truth, predicted, strict=True))]
    lower = [{**line, "answer": line["answer"].lower()} for line in lines]
    assert bootstrap_scores("macro_f1", None, [lines]) == bootstrap_scores("macro_f1", None, [lower])


def test_a_resample_without_a_positive_has_no_auc() -> None:
    lines = [row(i, "yes" if i == 0 else "no", "no", 0.5) for i in range(4)]
    scores = bootstrap_scores("auc", "yes", [lines])
    missing = [0 not in draw or (draw == 0).all() for draw in resamples(4, 200, seed=0)]
    assert [math.isnan(score) for score in scores] == missing
    assert 0 < sum(missing) < 200


def test_a_test_set_has_one_digest() -> None:
    lines = rows(4)
    digest = answers.test_digest(lines)
    assert len(digest) == 16
    assert answers.test_digest(rows(5)) == digest, "other answers of a model"
    assert answers.test_digest([Prediction(**line) for line in reversed(lines)]) == digest
    assert answers.test_digest([{**line, "pattern": p} for p in ("both", "text") for line in lines]) == digest
    assert answers.test_digest([*lines[1:], {**lines[0], "answer": "maybe"}]) != digest
    assert answers.test_digest(lines[1:]) != digest
