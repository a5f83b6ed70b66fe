"""`summarise` on hand-written predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from fedmllm.data.samples import Task
from fedmllm.evaluation.predictions import Prediction
from fedmllm.evaluation.summary import Choices, summarise
from fedmllm.kinds import Match
from fedmllm.report.tables import metrics_table, percent

AUC = Task("made", "auc", lambda split: [], positive="yes")
F1 = Task("made", "macro-f1", lambda split: [])
ACCURACY = Task("made", "accuracy", lambda split: [])


def prediction(truth: str, answer: str, score: float | None = None, correct: bool | None = None) -> Prediction:
    right = truth == answer if correct is None else correct
    return Prediction("both", truth, truth, answer, right, score is not None, not answer, score)


def chosen(choices: Sequence[str], truth: int, option: int) -> Prediction:
    """The answer to a closed question."""
    return Prediction("both", "", choices[truth], choices[option], truth == option, True, False, option=option)


def of(task: Task, *models: Sequence[Prediction], match: Match = "exact", choices: Choices | None = None) -> dict[str, Any]:
    return summarise(task, models, match, choices or {})["both"]


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


@pytest.mark.parametrize(
    ("yes", "no", "match"),
    [
        *((yes, no, match) for yes, no in (("Yes", "No"), ("yes", "no"), ("YES.", "NO.")) for match in ("exact", "squad")),
        ("ｙｅｓ", "Ｎｏ", "exact"),
    ],
)
def test_wrong_answers_belong_to_classes_as_references_do(yes: str, no: str, match: Match) -> None:
    """8 of 10 yes and 18 of 20 no are right. yes: 2·8 / (10 + 10), no: 2·18 / (20 + 20)."""
    rows = [prediction(yes, "yes", correct=True)] * 8 + [prediction(yes, "no")] * 2
    rows += [prediction(no, "no", correct=True)] * 18 + [prediction(no, "yes")] * 2
    assert of(F1, rows, match=match)["macro_f1"] == pytest.approx((0.8 + 0.9) / 2)


PAIRS = [("15 cm", "1.5 cm"), ("C", "C++"), ("1", "-1"), ("<5", "5"), ("Vitamin", "Vitamin A"), ("U.S.", "us"), ("½", "12"),
         ("A.", "a")]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("match", ["exact", "squad"])
def test_closed_answers_are_told_apart_by_their_index(pair: tuple[str, str], match: Match) -> None:
    # Two references of each, and always the first is chosen: 2·2 / (2 + 4) and 0.
    rows = [chosen(pair, truth, 0) for truth in (0, 0, 1, 1)]
    summary = of(F1, rows, match=match)
    assert summary["accuracy"] == 0.5
    assert summary["macro_f1"] == pytest.approx((2 / 3 + 0) / 2, abs=1e-6)


def test_choices_that_differ_only_in_case_are_one_class_and_yet_right_or_wrong() -> None:
    rows = [chosen(("us", "US", "them"), truth, option) for truth, option in ((0, 0), (0, 1), (2, 2))]
    assert of(F1, rows)["macro_f1"] == pytest.approx((2 * 1 / (2 + 2) + 1) / 2)
    # In questions of their own they are one class in any case.
    assert of(F1, [chosen(("Yes", "No"), 0, 0), chosen(("yes", "no"), 0, 1), chosen(("yes", "no"), 1, 1)])["macro_f1"] == (
        pytest.approx((2 / 3 + 2 / 3) / 2, abs=1e-6)
    )


def test_a_free_answer_has_the_class_of_the_option_that_reads_like_it() -> None:
    rows = [chosen(("Yes.", "No."), 0, 0), chosen(("Yes.", "No."), 1, 1), prediction("no", "yes"), prediction("yes", "yes")]
    assert of(F1, rows)["macro_f1"] == pytest.approx((2 * 2 / (2 + 3) + 2 * 1 / (2 + 1)) / 2, abs=1e-6)


# What guessing would score


def test_majority_and_chance_of_accuracy() -> None:
    rows = [replace(prediction(t, "x"), id=str(i)) for i, t in enumerate(["Yes", "yes.", "no", "maybe"])]
    choices = {"0": ("Yes", "no"), "1": ("yes.", "no"), "2": ("yes", "no"), "3": ("a", "b", "c", "maybe")}
    summary = of(ACCURACY, rows, choices=choices)
    assert summary["majority"] == 0.5, "a reference's case and full stop do not make it another answer"
    assert summary["chance"] == pytest.approx((3 * 0.5 + 0.25) / 4)
    assert "chance" not in of(ACCURACY, rows, choices={**choices, "2": None}), "one question is open"


def test_majority_and_chance_of_macro_f1() -> None:
    choices = ("a", "b", "c")
    rows = [replace(chosen(choices, truth, 0), id=str(i)) for i, truth in enumerate((0, 0, 0, 1))]
    summary = of(F1, rows, choices=dict.fromkeys("0123", choices))
    assert summary["macro_f1"] == summary["majority"] == pytest.approx((2 * 3 / (3 + 4) + 0) / 2, abs=1e-6)
    # A third of each class is hit, and each class is said in a third of the four questions.
    assert summary["chance"] == pytest.approx((2 * 1 / (3 + 4 / 3) + 2 / 3 / (1 + 4 / 3)) / 2, abs=1e-6)


def test_majority_and_chance_of_auc_are_a_half() -> None:
    rows = [replace(p, id=str(i)) for i, p in enumerate(RANKED)]
    summary = of(AUC, rows, choices={p.id: ("yes", "no") for p in rows})
    assert (summary["majority"], summary["chance"]) == (0.5, 0.5)


def test_the_table_shows_them_beside_the_score() -> None:
    rows = [replace(prediction("yes", "yes"), id=str(i)) for i in range(3)]
    metrics = summarise(ACCURACY, [rows], "exact", {p.id: ("yes", "no") for p in rows})
    columns = {str(column.header): list(column.cells) for column in metrics_table(metrics, "made").columns}
    assert columns["majority %"] == ["100.0"]
    assert columns["chance %"] == ["50.0"]
