"""Put the questions of suites to the models of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from fedmllm.data.prompts import render
from fedmllm.data.samples import Sample
from fedmllm.errors import DataError
from fedmllm.evaluation.predictions import PATTERNS, Prediction
from fedmllm.evaluation.suites import Ask, Exam, Findings, LivePicture, OneModel, Replies, suites
from fedmllm.evaluation.test_set import TestSet
from fedmllm.kinds import Pattern
from fedmllm.models import live
from fedmllm.runs.session import Session

Predict = Callable[[TestSet], list[list[Prediction]]]
"""A test set -> the predictions of each model."""
Use = Callable[[], AbstractContextManager[None]]
"""Makes the session's model compute with one of the models."""
_BATCHES = 4
"""Questions are encoded this many batches at a time, so that altered pictures need no memory beyond that."""


def examine(
    session: Session,
    names: Sequence[str],
    predict: Predict,
    models: Sequence[Use],
    owners: Sequence[int] = (),
    own_data: bool = True,
) -> dict[str, Any]:
    """{suite: {"tables", "unavailable", "details"}}. `models` are those of `predict` one by one, and `owners` has the client of
    each if every client has its own; `own_data` says whether the clients of the session hold the task's data. A suite that
    cannot ask its questions says why."""
    dataset, counts = session.dataset, session.dataset.manifest.patterns()
    exam = Exam(
        dataset.task, dataset.test, session.config.eval.patterns, session.config.eval.match, session.config.seed,
        counts if own_data else counts[:0], owners, _asking(session, predict),
        [_one_model(session, use) for use in models],
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


def _longest(session: Session) -> int:
    """Two texts, or a text with typos, have more tokens than the sample's own, which is no mistake in the data."""
    return 2 * session.config.train.max_length


def _one_model(session: Session, use: Use) -> OneModel:
    def predict(tests: TestSet) -> list[list[Prediction]]:
        with use():
            return [tests.predict(session.config.eval)]

    def questions(samples: Sequence[Sample], pattern: Pattern) -> Iterator[LivePicture]:
        with use():
            for number, sample in enumerate(samples, start=1):
                session.progress("asking", number, len(samples), f"one by one, {pattern}")
                talk = render(sample, PATTERNS[pattern], session.parts.strategy)
                with session.model.forgetting_pictures():
                    question = session.model.encode_one(talk, sample.image, _longest(session), asks=True)
                    yield live.LivePicture(session.model, question)

    ask = _asking(session, predict)
    return OneModel(lambda samples, pattern: ask(samples, (pattern,))[pattern][0], questions)


def _asking(session: Session, predict: Predict) -> Ask:
    train = session.config.train.model_copy(update={"max_length": _longest(session)})
    size = _BATCHES * session.config.eval.batch_size

    def ask(samples: Sequence[Sample], patterns: Sequence[Pattern]) -> dict[Pattern, list[Replies]]:
        replies: dict[Pattern, list[Replies]] = {pattern: [] for pattern in patterns}
        for start in range(0, len(samples), size):
            session.progress("asking", start, len(samples), "")
            with session.model.forgetting_pictures():
                chunk, strategy = samples[start : start + size], session.parts.strategy
                models = predict(TestSet(session.model, session.dataset.task, chunk, patterns, strategy, train, "skip"))
            for pattern, of_models in replies.items():
                of_models += [{} for _ in range(len(models) - len(of_models))]
                for of_model, predictions in zip(of_models, models, strict=True):
                    of_model |= {p.id: p for p in predictions if p.pattern == pattern}
        session.progress("asking", len(samples), len(samples), "")
        return replies

    return ask
