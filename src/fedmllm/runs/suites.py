"""Put the questions of suites to the models of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedmllm.data.samples import Sample
from fedmllm.errors import DataError
from fedmllm.evaluation.predictions import Prediction
from fedmllm.evaluation.suites import Exam, Findings, Replies, suites
from fedmllm.evaluation.test_set import TestSet
from fedmllm.kinds import Pattern
from fedmllm.runs.session import Session

Predict = Callable[[TestSet], list[list[Prediction]]]
"""A test set -> the predictions of each model."""
_BATCHES = 4
"""Questions are encoded this many batches at a time, so that altered pictures need no memory beyond that."""


def examine(
    session: Session, names: Sequence[str], predict: Predict, owners: Sequence[int] = (), own_data: bool = True
) -> dict[str, Any]:
    """{suite: {"tables", "unavailable", "details"}}. `owners` has the client of each model if every client has its own;
    `own_data` says whether the clients of the session hold the task's data. A suite that cannot ask its questions says why."""
    dataset, counts = session.dataset, session.dataset.manifest.patterns()
    exam = Exam(
        dataset.task, dataset.test, session.config.eval.patterns, session.config.eval.match, session.config.seed,
        counts if own_data else counts[:0], owners, _asking(session, predict),
    )  # fmt: skip
    results = {}
    for number, name in enumerate(names):
        session.progress("suites", number, len(names), name)
        try:
            results[name] = suites.build(name, {})(exam).to_json()
        except DataError as error:
            results[name] = without_models(str(error))
    return results


def without_models(why: str) -> dict[str, Any]:
    """The findings of a suite that could not ask anything."""
    return Findings(unavailable=[why]).to_json()


def _asking(
    session: Session, predict: Predict
) -> Callable[[Sequence[Sample], Sequence[Pattern]], dict[Pattern, list[Replies]]]:
    # Two texts, or a text with typos, have more tokens than the sample's own, which is no mistake in the data.
    train = session.config.train.model_copy(update={"max_length": 2 * session.config.train.max_length})
    size = _BATCHES * session.config.eval.batch_size

    def ask(samples: Sequence[Sample], patterns: Sequence[Pattern]) -> dict[Pattern, list[Replies]]:
        replies: dict[Pattern, list[Replies]] = {pattern: [] for pattern in patterns}
        for start in range(0, len(samples), size):
            with session.model.forgetting_pictures():
                chunk, strategy = samples[start : start + size], session.parts.strategy
                models = predict(TestSet(session.model, session.dataset.task, chunk, patterns, strategy, train, "skip"))
            for pattern, of_models in replies.items():
                of_models += [{} for _ in range(len(models) - len(of_models))]
                for of_model, predictions in zip(of_models, models, strict=True):
                    of_model |= {p.id: p for p in predictions if p.pattern == pattern}
        return replies

    return ask
