"""A test set that is encoded once and can then be answered by any number of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from fedmllm.config import EvalTable, TrainTable
from fedmllm.data.files import EntryError
from fedmllm.data.loading import problem_of, refuse_problems
from fedmllm.data.prompts import Strategy, render
from fedmllm.data.samples import Modality, Problem, Sample, Task
from fedmllm.errors import RunError
from fedmllm.evaluation.matching import normal_form
from fedmllm.evaluation.predictions import PATTERNS, Prediction
from fedmllm.kinds import Match, Pattern
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_scores
from fedmllm.tensors import Tensors

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A test sample, encoded with the modalities that one pattern shows."""

    sample: Sample
    encoded: Encoded


@dataclass(frozen=True)
class Answer:
    """`option` is the index of a chosen option, `score` the probability of the positive one, None if there is none;
    `probabilities` are those of all options."""

    text: str
    option: int | None = None
    score: float | None = None
    probabilities: tuple[float, ...] = ()


AnsweredQuestions = dict[int, Answer]
"""question index -> answer."""


class TestSet:
    """A fixed set of questions about `samples`, under each of `patterns`.

    Under "image" and "text", samples without that modality are left out. `problems` are the samples that the model cannot be
    asked about; with `on_bad_sample = "skip"` they are left out of every pattern.
    """

    def __init__(
        self,
        model: MLLM,
        task: Task,
        samples: Sequence[Sample],
        patterns: Sequence[Pattern],
        strategy: Strategy,
        train: TrainTable,
        on_bad_sample: Literal["error", "skip"] = "error",
    ) -> None:
        """`train` limits the length of a prompt. Raises DataError if the model cannot be asked about a sample, or, with
        "skip", about any."""
        self._model, self._task, self._lr = model, task, train.lr
        self._questions: list[Question] = []
        self._rows: dict[Pattern, list[int]] = {pattern: [] for pattern in patterns}
        shown = [(pattern, sample, sample.modalities & PATTERNS[pattern]) for pattern in patterns for sample in samples]
        shown = [(pattern, sample, visible) for pattern, sample, visible in shown if pattern == "both" or visible]
        # A sample without text looks the same under "both" and "image", so both patterns share one question.
        encoded: dict[tuple[str, frozenset[Modality]], Encoded] = {}
        refused: dict[str, Problem] = {}
        for number, (_, sample, visible) in enumerate(shown, start=1):
            model.progress("encoding questions", number, len(shown), "")
            if sample.id not in refused and (sample.id, visible) not in encoded:
                talk = render(sample, visible, strategy)
                try:
                    encoded[sample.id, visible] = model.encode_one(talk, sample.image, train.max_length, asks=True)
                except EntryError as error:
                    refused[sample.id] = problem_of(sample, task, str(error), error.kind)
        self.problems = list(refused.values())
        if refused:
            nothing_left = f"the model can be asked about no test sample of task {task.name!r}"
            refuse_problems(self.problems, len(samples) - len(refused), nothing_left, on_bad_sample)
        indices: dict[tuple[str, frozenset[Modality]], int] = {}
        for pattern, sample, visible in shown:
            if sample.id not in refused:
                if (sample.id, visible) not in indices:
                    indices[sample.id, visible] = len(self._questions)
                    self._questions.append(Question(sample, encoded[sample.id, visible]))
                self._rows[pattern].append(indices[sample.id, visible])

    @property
    def size(self) -> int:
        """The number of distinct questions."""
        return len(self._questions)

    def longest(self, rows: int) -> tuple[list[Encoded], list[Encoded]]:
        """The longest batches of closed and of open questions, as they are asked."""
        encoded = sorted((question.encoded for question in self._questions), key=lambda e: len(e.prompt))
        closed, free = ([e for e in encoded if bool(e.options) == wanted] for wanted in (True, False))
        return closed[-rows:], free[-rows:]

    @property
    def choices(self) -> dict[str, tuple[str, ...] | None]:
        """id of a sample -> the options of its question, None if it is answered freely."""
        return {question.sample.id: question.sample.choices for question in self._questions}

    def answers(self, settings: EvalTable) -> list[Answer]:
        """The current adapter's answer to each distinct question: under one pattern, in the order of the samples. Raises
        RunError if the model computes NaN."""
        answered = self._answer(settings, 1, 0, 1)[0]
        return [answered[index] for index in range(self.size)]

    def predict(self, settings: EvalTable) -> list[Prediction]:
        """The predictions of the current adapter, grouped by pattern. Raises RunError if the model computes NaN."""
        return self._predictions(self._answer(settings, 1, 0, 1)[0], settings.match)

    def predict_each(self, settings: EvalTable, adapters: Sequence[Tensors]) -> Iterator[list[Prediction]]:
        """The predictions of each adapter.

        If one adapter's questions do not fill a batch, several adapters are evaluated in one pass. Raises RunError if the model
        computes NaN.
        """
        per_pass = settings.batch_size // max(1, self.size) if self._model.adapter.stacks else 1
        for start in range(0, len(adapters), max(1, per_pass)):
            group = adapters[start : start + max(1, per_pass)]
            if len(group) == 1:
                self._model.adapter.set(group[0])
                if not self._model.fused:
                    yield self._predictions(self._answer(settings, 1, start, len(adapters))[0], settings.match)
                    continue
            with self._model.stacked(group):
                answers = self._answer(settings, len(group), start, len(adapters))
            yield from (self._predictions(answered, settings.match) for answered in answers)

    def _predictions(self, answers: AnsweredQuestions, match: Match) -> list[Prediction]:
        return [
            _prediction(pattern, self._questions[index].sample, answers[index], match)
            for pattern, indices in self._rows.items()
            for index in indices
        ]

    def _answer(self, settings: EvalTable, adapters: int, before: int, total: int) -> list[AnsweredQuestions]:
        """The answers of each stacked adapter, or of the current adapter if `adapters` is 1. `before` of `total` adapters have
        answered already."""
        answered = 0

        def tell(questions: int) -> None:
            nonlocal answered
            answered += questions * adapters
            whose = f"model {before + 1} of {total}" if total > 1 else ""
            self._model.progress("testing", before * self.size + answered, total * self.size, whose)

        tell(0)
        try:
            return self._computed(settings, adapters, tell)
        except FloatingPointError as error:
            raise RunError(
                f"the test questions cannot be answered, because {error}: if the adapter was trained, it diverged, so "
                f'lower train.lr, which was {self._lr:g}; if it was not, set model.precision = "fp32".'
            ) from None

    def _computed(self, settings: EvalTable, adapters: int, tell: Callable[[int], None]) -> list[AnsweredQuestions]:
        by_length = sorted(range(len(self._questions)), key=lambda i: len(self._questions[i].encoded.prompt))
        closed = [i for i in by_length if self._questions[i].encoded.options]
        open_ended = [i for i in by_length if not self._questions[i].encoded.options]
        answers: list[AnsweredQuestions] = [{} for _ in range(adapters)]

        def generate(rows: Sequence[Encoded], adapters: int) -> list[str]:
            return self._model.generate(rows, settings.max_new_tokens)

        for batch in _chunks(closed, settings.batch_size):
            for i, scores in zip(batch, self._in_parts(batch, adapters, self._scores), strict=True):
                for answered, of_options in zip(answers, scores, strict=True):
                    answered[i] = self._choose(i, of_options)
            tell(len(batch))
        for batch in _chunks(open_ended, settings.batch_size):
            for i, texts in zip(batch, self._in_parts(batch, adapters, generate), strict=True):
                for answered, text in zip(answers, texts, strict=True):
                    answered[i] = Answer(text)
            tell(len(batch))
        return answers

    def _in_parts(
        self, batch: Sequence[int], adapters: int, compute: Callable[[Sequence[Encoded], int], Sequence[T]]
    ) -> Iterator[tuple[T, ...]]:
        """What `compute` returns for each question under each adapter, for fewer questions at once if memory is full."""

        def of_part(part: Sequence[int]) -> list[tuple[T, ...]]:
            results = compute([self._questions[i].encoded for i in part] * adapters, adapters)
            return list(zip(*(results[k : k + len(part)] for k in range(0, len(results), len(part))), strict=True))

        limits = self._model.limits
        return limits.in_parts(limits.questions, batch, of_part, lambda: False)

    def _scores(self, rows: Sequence[Encoded], adapters: int) -> list[list[float]]:
        return option_scores(self._model, rows, adapters)

    def _choose(self, index: int, scores: Sequence[float]) -> Answer:
        """The most probable choice of a closed question and the probabilities; `scores` are in logs."""
        choices, chosen = self._questions[index].sample.choices or (), int(np.argmax(scores))
        positive = choices.index(self._task.positive) if self._task.positive in choices else None
        probabilities = tuple(np.exp(scores).tolist())
        return Answer(choices[chosen], chosen, probabilities[positive] if positive is not None else None, probabilities)


def _prediction(pattern: str, sample: Sample, answer: Answer, match: Match) -> Prediction:
    if answer.option is not None:  # by index: two choices may read alike
        correct = answer.option == (sample.choices or ()).index(sample.answer)
    else:
        correct = normal_form(answer.text, match) == normal_form(sample.answer, match)
    failed = not answer.text.strip()
    return Prediction(
        pattern, sample.id, sample.answer, answer.text, correct, sample.is_closed, failed, answer.score, None, answer.option,
        answer.probabilities, round(max(answer.probabilities), 3) if answer.probabilities else None,
    )  # fmt: skip


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
