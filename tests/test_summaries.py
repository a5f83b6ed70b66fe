"""What a set of predictions is worth: `summarise` on predictions written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from fedmllm.data.samples import Task
from fedmllm.evaluation.predictions import Prediction
from fedmllm.evaluation.summary import summarise
from fedmllm.report.tables import percent

AUC = Task("made", "auc", lambda split: [], positive="yes")
F1 = Task("made", "macro-f1", lambda split: [])


def answered(truth: str, said: str, score: float | None = None, correct: bool | None = None) -> Prediction:
    right = truth == said if correct is None else correct
    return Prediction("both", truth, truth, said, right, score is not None, not said, score)


def of(task: Task, *models: Sequence[Prediction]) -> dict[str, float]:
    return summarise(task, models, seed=0, bootstrap=50)["both"]


RANKED = [answered("yes", "yes", 0.9), answered("no", "no", 0.2), answered("yes", "no", 0.4), answered("no", "yes", 0.6)] * 5
OTHERS = [answered("red", "red"), answered("blue", "red")] * 3


def test_auc_is_of_the_samples_that_have_the_positive_answer() -> None:
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


def test_auc_is_nan_where_no_sample_has_the_positive_answer_or_a_score_is_nan() -> None:
    assert math.isnan(of(AUC, OTHERS)["auc"])
    assert of(AUC, OTHERS)["auc_n"] == 0
    assert math.isnan(of(AUC, [*RANKED, answered("yes", "yes", math.nan)])["auc"])


@pytest.mark.parametrize("other", ["", "purple"])
def test_an_answer_that_no_reference_names_is_wrong_and_no_class_of_its_own(other: str) -> None:
    assert of(F1, [answered("red", "red"), answered("blue", other)])["macro_f1"] == 0.5


def test_an_answer_is_in_its_class_however_it_is_written() -> None:
    assert of(F1, [answered("red", "Red.", correct=True), answered("blue", "blue")])["macro_f1"] == 1
