"""Test one model under modality patterns: what it answers, and the metrics of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from fedmllm.config import EvalTable
from fedmllm.data.prompts import Strategy, render
from fedmllm.data.samples import Modality, Sample, Task
from fedmllm.evaluation.intervals import interval, mean_interval, resamples
from fedmllm.evaluation.metrics import auc, macro_f1, normalise, token_f1
from fedmllm.kinds import Pattern
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.tensors import Tensors

PATTERNS: dict[Pattern, frozenset[Modality]] = {
    "both": frozenset(("image", "text")),
    "image": frozenset(("image",)),
    "text": frozenset(("text",)),
}


@dataclass(frozen=True)
class Question:
    """A test sample as one pattern shows it. Under "image" and "text" only samples that have that modality are asked."""

    sample: Sample
    encoded: Encoded


@dataclass(frozen=True)
class Prediction:
    """`score` is the probability of the positive answer, where the task has one; `failed`: there was no answer to read;
    `judged`: what a judge said of an open answer, None where none was asked or its reply could not be read."""

    pattern: str
    id: str
    answer: str
    predicted: str
    correct: bool
    closed: bool
    failed: bool
    score: float | None = None
    judged: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Answers = dict[int, tuple[str, float | None]]
"""question -> (what was answered, probability of the positive answer)."""


class TestSet:
    """A fixed set of questions, encoded once and put to any number of adapters."""

    def __init__(
        self,
        model: MLLM,
        task: Task,
        samples: Sequence[Sample],
        patterns: Sequence[Pattern],
        strategy: Strategy,
        max_length: int,
    ) -> None:
        self._model, self._task = model, task
        self._rows: dict[Pattern, list[int]] = {pattern: [] for pattern in patterns}
        known: dict[tuple[str, frozenset[Modality]], int] = {}
        shown: list[tuple[Sample, frozenset[Modality]]] = []
        for pattern in self._rows:
            for sample in samples:
                visible = sample.modalities & PATTERNS[pattern]
                if pattern != "both" and not visible:
                    continue
                # A sample without text looks the same under "both" and "image": it is asked once.
                if (sample.id, visible) not in known:
                    known[sample.id, visible] = len(shown)
                    shown.append((sample, visible))
                self._rows[pattern].append(known[sample.id, visible])
        conversations = [render(sample, visible, strategy) for sample, visible in shown]
        encoded = model.encode(conversations, [sample.image for sample, _ in shown], max_length)
        self._questions = [Question(sample, one) for (sample, _), one in zip(shown, encoded, strict=True)]

    @property
    def size(self) -> int:
        """Distinct questions asked."""
        return len(self._questions)

    def predict(self, settings: EvalTable) -> list[Prediction]:
        """The predictions of the adapter that is set now, pattern by pattern."""
        return self._predictions(self._answers(settings, 1)[0])

    def predict_each(self, settings: EvalTable, adapters: Sequence[Tensors]) -> Iterator[list[Prediction]]:
        """The predictions of each adapter. Several are tested in one pass where the questions alone do not fill a batch."""
        together = settings.batch_size // max(1, self.size) if self._model.adapter.stacks else 1
        for start in range(0, len(adapters), max(1, together)):
            group = adapters[start : start + max(1, together)]
            if len(group) == 1:
                self._model.adapter.set(group[0])
                if not self._model.lean:
                    yield self.predict(settings)
                    continue
            with self._model.stacked(group):
                answers = self._answers(settings, len(group))
            yield from map(self._predictions, answers)

    def _predictions(self, answers: Answers) -> list[Prediction]:
        return [
            self._judge(pattern, self._questions[index], *answers[index])
            for pattern, indices in self._rows.items()
            for index in indices
        ]

    def _answers(self, settings: EvalTable, clients: int) -> list[Answers]:
        """What each of the stacked clients answers, or the one adapter that is set."""
        by_length = sorted(range(len(self._questions)), key=lambda i: len(self._questions[i].encoded.prompt))
        closed = [i for i in by_length if self._questions[i].encoded.options]
        open_ended = [i for i in by_length if not self._questions[i].encoded.options]
        answers: list[Answers] = [{} for _ in range(clients)]
        for batch in _chunks(closed, settings.batch_size):
            asked = [self._questions[i].encoded for i in batch] * clients
            found = iter(self._model.option_scores(asked, clients))
            for mine in answers:
                for i, scores in zip(batch, found, strict=False):
                    choices = self._questions[i].sample.choices or ()
                    at = choices.index(self._task.positive) if self._task.positive in choices else None
                    mine[i] = (choices[int(np.argmax(scores))], float(np.exp(scores[at])) if at is not None else None)
        for batch in _chunks(open_ended, settings.batch_size):
            asked = [self._questions[i].encoded for i in batch] * clients
            texts = iter(self._model.generate(asked, settings.max_new_tokens))
            for mine in answers:
                mine |= {i: (text, None) for i, text in zip(batch, texts, strict=False)}
        return answers

    def _judge(self, pattern: str, question: Question, predicted: str, score: float | None) -> Prediction:
        sample = question.sample
        said = normalise(predicted)
        # An answer that normalises to nothing ("a", "the") is compared as it stands.
        correct = said == normalise(sample.answer) if said else predicted.strip() == sample.answer
        failed = not predicted.strip()
        return Prediction(pattern, sample.id, sample.answer, predicted, correct, sample.is_closed, failed, score)


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def summarise(
    task: Task, models: Sequence[Sequence[Prediction]], seed: int, bootstrap: int, judged: bool = False
) -> dict[str, dict[str, Any]]:
    """{pattern: {metric: value, metric_ci: [low, high], "n", "parse_failures"}}; metrics are shares of 1, and
    `metric_n` says of how many samples, where it is of fewer than `n`.

    With several models (clients that trained alone, or have a model of their own) each figure is the mean over them, the
    interval is of that mean, and the task's metric has a `…_worst_decile`: the mean over the lowest tenth of the models,
    rounded up. `judged` adds what a judge made of the open answers, closed ones as they are. `ceiling` is the best score of
    the task's metric that any model can reach, where the task knows it.
    """
    patterns = list(dict.fromkeys(p.pattern for p in models[0]))
    return {
        name: _of_pattern(task, [[p for p in m if p.pattern == name] for m in models], seed, bootstrap, judged)
        | ({"ceiling": round(task.ceiling[name], 6)} if name in task.ceiling else {})
        for name in patterns
    }


def _of_pattern(task: Task, models: list[list[Prediction]], seed: int, bootstrap: int, judged: bool) -> dict[str, Any]:
    n = len(models[0])
    summary: dict[str, Any] = {"n": n, "parse_failures": round(sum(p.failed for m in models for p in m) / len(models))}

    def put(name: str, values: np.ndarray) -> None:
        if len(values):
            summary[name] = round(float(values.mean()), 6)
            summary[f"{name}_ci"] = [round(v, 6) for v in mean_interval(values, resamples(len(values), bootstrap, seed))]

    correct = np.array([[p.correct for p in m] for m in models], dtype=np.float64).mean(axis=0)
    closed = np.array([p.closed for p in models[0]], dtype=bool)
    put("accuracy", correct)
    if closed.any() and not closed.all():
        put("accuracy_closed", correct[closed])
        put("accuracy_open", correct[~closed])
    if not closed.all():
        overlap = np.array([[token_f1(p.predicted, p.answer) for p in m if not p.closed] for m in models]).mean(axis=0)
        put("token_f1_open", overlap)
        if judged:
            said = np.array([[p.correct if p.closed else p.judged is True for p in m] for m in models], dtype=np.float64)
            put("judged_accuracy", said.mean(axis=0))
            put("judged_accuracy_open", said.mean(axis=0)[~closed])
            failures = sum(p.judged is None for m in models for p in m if not p.closed)
            summary["judge_failures"] = round(failures / len(models))
    for name, (statistic, count) in _ranked(task, models).items():
        summary[name] = round(statistic(np.arange(count)), 6)
        summary[f"{name}_ci"] = [round(v, 6) for v in interval(statistic, resamples(count, bootstrap, seed))]
        if count < n:
            summary[f"{name}_n"] = count
    if len(models) > 1:
        metric = primary_metric(task)
        each = sorted(_alone(task, m) for m in models)
        summary[f"{metric}_worst_decile"] = round(float(np.mean(each[: math.ceil(len(each) / 10)])), 6)
    return summary


def _alone(task: Task, model: list[Prediction]) -> float:
    """The task's metric of one model."""
    if task.metric == "accuracy":
        return float(np.mean([p.correct for p in model]))
    statistic, count = _ranked(task, [model])[primary_metric(task)]
    return statistic(np.arange(count))


Statistic = Callable[[np.ndarray], float]


def _ranked(task: Task, models: list[list[Prediction]]) -> dict[str, tuple[Statistic, int]]:
    """Statistics of a draw of indices that are no means over samples, and how many samples each draws from."""
    if task.metric == "accuracy":
        return {}
    truth = np.array([p.answer for p in models[0]])
    # A right answer is in its class however it is written.
    said = [np.array([p.answer if p.correct else p.predicted for p in m]) for m in models]

    def f1(draw: np.ndarray) -> float:
        return float(np.mean([macro_f1(truth[draw], s[draw]) for s in said]))

    found: dict[str, tuple[Statistic, int]] = {"macro_f1": (f1, len(truth))}
    if task.metric == "auc":
        # A sample without the positive answer among its choices has no place in the ranking.
        asked = np.array([i for i, p in enumerate(models[0]) if p.score is not None], dtype=np.int64)
        positive = truth[asked] == task.positive
        scores = [np.array([m[i].score for i in asked], dtype=np.float64) for m in models]
        yes = [s[asked] == task.positive for s in said]

        def area(by: list[np.ndarray], draw: np.ndarray) -> float:
            return float(np.mean([auc(positive[draw], values[draw]) for values in by]))

        found |= {"auc": (partial(area, scores), len(asked)), "auc_hard": (partial(area, yes), len(asked))}
    return found


def primary_metric(task: Task) -> str:
    """The key of the task's metric in a summary."""
    return task.metric.replace("-", "_")
