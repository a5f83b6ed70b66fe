"""Suites examine what a finished model uses, one file each: questions beyond the plain test, and what the answers show.

A suite is given an `Exam`, which can put any questions to the models of a run, and returns `Findings`. What a task cannot
offer, such as pictures to corrupt, is a sentence in the findings and not an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.samples import Sample, Task
from fedmllm.evaluation.answers import Answers
from fedmllm.evaluation.metrics import ones
from fedmllm.evaluation.predictions import Prediction
from fedmllm.evaluation.summary import primary_metric
from fedmllm.kinds import Match, Pattern
from fedmllm.registry import Registry

Replies = dict[str, Prediction]
"""id of a sample -> the answer of one model."""
Ask = Callable[[Sequence[Sample], Sequence[Pattern]], dict[Pattern, list[Replies]]]
"""Puts samples with distinct ids to every model under each pattern, as the plain test does. Samples that the model cannot be
asked about, such as a text that is too long, are left out."""
Figures = Mapping[str, Mapping[str, float | int]]
"""{row: {column: figure}}. A float is a share of 1 or a difference of shares, an int is a count."""


class LivePicture(Protocol):
    """A closed question about a picture, put to one model with any pixels in the picture's place.

    `pixels`: the picture as it enters the vision tower, from 0 (black) to 1 (white), in any shape.
    """

    pixels: NDArray[np.float32]

    def scores(self, pixels: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n, options): the log-probabilities of the options for n pictures, (n, *shape of `pixels`)."""

    def gradients(self, pixels: NDArray[np.float32], option: int) -> NDArray[np.float32]:
        """(n, …): the gradients of minus the log-probability of an option. Raises DataError if the model gives none."""


@dataclass(frozen=True)
class OneModel:
    """One of the models alone.

    `ask` is as that of the exam under one pattern. `live` yields the question about each sample with its picture, which must be
    closed, as the pattern shows it; a question can be used until the next one is taken. It raises DataError if the model's
    pictures cannot be altered.
    """

    ask: Callable[[Sequence[Sample], Pattern], Replies]
    live: Callable[[Sequence[Sample], Pattern], Iterator[LivePicture]]


@dataclass(frozen=True)
class Exam:
    """What a suite examines: the test `samples` of a task, and the models of a run, which answer what `ask` puts to them.

    `patterns` are those of the plain test. `counts` (clients, 4) is the number of training samples of which each client sees
    both modalities, the image only, the text only, and neither; it has no rows if the clients hold other data. `owners` has
    the client of each model if every client has its own. `models` are the same models one by one.
    """

    task: Task
    samples: Sequence[Sample]
    patterns: Sequence[Pattern]
    match: Match
    seed: int
    counts: NDArray[np.int64]
    owners: Sequence[int]
    ask: Ask
    models: Sequence[OneModel]

    def score(self, models: Sequence[Replies]) -> float:
        """The task's metric, averaged over the models; NaN without answers or without a class that AUC needs."""
        number = len(models[0])
        if not number:
            return float("nan")
        answers = Answers.of([list(replies.values()) for replies in models], self.task.positive, self.match)
        return float(answers.score(primary_metric(self.task), ones(number))[0])


@dataclass
class Findings:
    """What a suite found: tables of figures, what the task cannot offer, one sentence each, and details for scripts, such as
    curves and rows by client."""

    tables: dict[str, Figures] = field(default_factory=dict)
    unavailable: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """{"tables", "unavailable", "details"}, with numbers rounded to six digits."""
        findings: dict[str, Any] = _rounded(vars(self))
        return findings


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return round(float(value), 6) if isinstance(value, float) else value


Suite = Callable[[Exam], Findings]
suites: Registry[Suite] = Registry("suite", __name__)
