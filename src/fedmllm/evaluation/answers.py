"""The answers of one or more models to the same questions, as arrays, and what a run stores of them for comparisons."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmllm.evaluation.intervals import resamples
from fedmllm.evaluation.matching import folded, normal_form
from fedmllm.evaluation.metrics import Classes, Floats, auc, macro_f1, numbered
from fedmllm.evaluation.predictions import Prediction
from fedmllm.kinds import Match

Row = Mapping[str, Any] | Prediction
"""A prediction, or a line of `predictions.jsonl`."""
DRAWS = 200
"""The number of resamples whose scores a run stores."""


@dataclass(frozen=True)
class Answers:
    """`rows[m][i]` is the answer of model m to question i. Arrays over models and questions are (m, n)."""

    rows: Sequence[Sequence[Mapping[str, Any]]]
    positive: str | None
    match: Match

    @classmethod
    def of(cls, models: Sequence[Sequence[Row]], positive: str | None, match: Match) -> Answers:
        return cls([[vars(row) if isinstance(row, Prediction) else row for row in model] for model in models], positive, match)

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """(m, n)."""
        return np.array([[row["correct"] for row in model] for model in self.rows], dtype=bool)

    @cached_property
    def closed(self) -> NDArray[np.bool_]:
        """(n,): whether a question counts among the closed ones."""
        return np.array([row["closed"] for row in self.rows[0]], dtype=bool)

    @cached_property
    def classes(self) -> list[str]:
        """The class of each reference."""
        return [self._class(row, row["answer"]) for row in self.rows[0]]

    @cached_property
    def truth(self) -> Classes:
        """(n,): the class of each reference as a number from 0."""
        return numbered(self.classes, self.classes)

    @cached_property
    def predicted(self) -> Classes:
        """(m, n): the class of each answer, that of the reference if it is right; −1 if it is no reference's."""
        names = [
            [
                own if row["correct"] else self._class(row, row["predicted"])
                for row, own in zip(model, self.classes, strict=True)
            ]
            for model in self.rows
        ]
        return np.stack([numbered(of_model, self.classes) for of_model in names])

    def _class(self, row: Mapping[str, Any], text: str) -> str:
        """The name of the class of an answer to the row's question.

        An option that was offered is told apart from the others, so only case, width and spaces are levelled. A free answer
        has its normal form, or the class of the offered options with this form if there is exactly one.
        """
        if row.get("option") is not None:
            return folded(text)
        form = normal_form(text, self.match)
        return self._offered.get(form, form)

    @cached_property
    def _offered(self) -> dict[str, str]:
        """normal form -> the class of the only references with this form that were among the options."""
        names: dict[str, set[str]] = {}
        for row in self.rows[0]:
            if row.get("option") is not None:
                names.setdefault(normal_form(row["answer"], self.match), set()).add(folded(row["answer"]))
        return {form: min(classes) for form, classes in names.items() if len(classes) == 1}

    @cached_property
    def ranked(self) -> NDArray[np.int64]:
        """The questions that AUC covers: without the positive answer among its choices, a question has no score."""
        return np.array([i for i, row in enumerate(self.rows[0]) if row["score"] is not None], dtype=np.int64)

    @cached_property
    def is_positive(self) -> NDArray[np.bool_]:
        """Of each ranked question."""
        return np.array([self.rows[0][i]["answer"] == self.positive for i in self.ranked], dtype=bool)

    @cached_property
    def scores(self) -> list[Floats]:
        """The probability of the positive answer to each ranked question, by model."""
        return [np.array([model[i]["score"] for i in self.ranked], dtype=np.float64) for model in self.rows]

    @cached_property
    def hard_scores(self) -> list[Floats]:
        """1 where a model chose the positive answer to a ranked question, else 0."""
        return [
            np.array([model[i]["predicted"] == self.positive for i in self.ranked], dtype=np.float64) for model in self.rows
        ]

    def score(self, metric: str, weights: Floats) -> Floats:
        """(k,): the metric, averaged over the models, for each of k weightings (k, n) of the questions."""
        if metric == "accuracy":
            shares: Floats = weights @ self.correct.mean(axis=0) / weights.sum(axis=1)
            return shares
        if metric == "macro_f1":
            of_models = [macro_f1(weights, self.truth, p, c) for p, c in zip(self.predicted, self.correct, strict=True)]
        else:
            scores = {"auc": self.scores, "auc_hard": self.hard_scores}[metric]
            of_models = [auc(weights[:, self.ranked], self.is_positive, values) for values in scores]
        mean: Floats = np.mean(of_models, axis=0)
        return mean


def bootstrap_scores(
    metric: str, positive: str | None, models: Sequence[Sequence[Row]], draws: int = DRAWS, match: Match = "squad"
) -> list[float]:
    """The primary metric, averaged over the models, on resamples of the questions under one pattern, to six digits.

    The resamples are plain, drawn with replacement from all questions in the order of their ids, and depend on nothing but
    the number of questions: they are common to all runs on a test set, whatever their seeds. NaN where one of them lacks a
    class that AUC needs. `match` is that of the run; the default is the rule of runs that do not say theirs.
    """
    models = [sorted(model, key=lambda row: row.id if isinstance(row, Prediction) else row["id"]) for model in models]
    answers, n = Answers.of(models, positive, match), len(models[0])
    weights = np.stack([np.bincount(draw, minlength=n) for draw in resamples(n, draws, 0)]).astype(np.float64)
    return [round(float(score), 6) for score in answers.score(metric, weights)]


def test_digest(rows: Iterable[Row]) -> str:
    """A short SHA-256 of the ids and references of the test samples, in any order and however often each is asked."""
    samples = {(row.id, row.answer) if isinstance(row, Prediction) else (row["id"], row["answer"]) for row in rows}
    return hashlib.sha256(json.dumps(sorted(samples)).encode()).hexdigest()[:16]
