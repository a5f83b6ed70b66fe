"""`summarise` on hand-written predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from fedmllm.data.samples import Task
from fedmllm.evaluation.predictions import Prediction, summarise
from fedmllm.report.tables import percent

AUC = Task("made", "auc", lambda split: [], positive="yes")
F1 = Task("made", "macro-f1", lambda split: [])


def prediction(truth: str, answer: str, score: float | None = None, correct: bool | None = None) -> Prediction:
    right = truth == answer if correct is None else correct
    return Prediction("both", truth, truth, answer, right, score is not None, not answer, score)


def of(task: Task, *models: Sequence[Prediction]) -> dict[str, float]:
    return summarise(task, models, seed=0, bootstrap=50)["both"]


RANKED = [
    prediction("yes", "yes", 0.9),
    prediction("no", "no", 0.2),
    prediction("yes", "no", 0.4),
    prediction("no", "yes", 0.6),
] * 5
OTHERS = [prediction("red", "red"), prediction("blue", "red")] * 3


def test_auc_covers_the_samples_with_the_positive_answer() -> None:
    alone, mixed = of(AUC, RANKED), of(AUC, [*RANKED, *OTHERS])
    for name in ("auc", "auc_ci", "auc_hard", "auc_hard_ci"):
        assert mixed[name] == alone[name]
    assert alone["auc"] == 0.75
    assert (mixed["n"], mixed["auc_n"], mixed["auc_hard_n"]) == (26, 20, 20)
    assert "auc_n" not in alone
    assert percent(mixed, "auc").endswith("] of 20")
    assert not percent(alone, "auc").endswith("of 20")
    two = of(AUC, [*RANKED, *OTHERS], [*RANKED, *OTHERS])
    assert (two["auc"], two["auc_worst_decile"], two["auc_n"]) == (0.75, 0.75, 20)


def test_auc_is_nan_without_positive_answers_or_with_a_nan_score() -> None:
    assert math.isnan(of(AUC, OTHERS)["auc"])
    assert of(AUC, OTHERS)["auc_n"] == 0
    assert math.isnan(of(AUC, [*RANKED, prediction("yes", "yes", math.nan)])["auc"])


@pytest.mark.parametrize("other", ["", "purple"])
def test_an_answer_outside_all_references_is_wrong_but_not_a_class(other: str) -> None:
    assert of(F1, [prediction("red", "red"), prediction("blue", other)])["macro_f1"] == 0.5


def test_the_spelling_of_an_answer_does_not_change_its_class() -> None:
    assert of(F1, [prediction("red", "Red.", correct=True), prediction("blue", "blue")])["macro_f1"] == 1
