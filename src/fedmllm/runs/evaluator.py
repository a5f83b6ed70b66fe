"""Test the models of a run: predictions, a judge's verdicts, other tasks' test sets, and the metrics of them all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from fedmllm.algorithms.factors import fold_of
from fedmllm.evaluation.answers import bootstrap_scores
from fedmllm.evaluation.judging import JudgeCache
from fedmllm.evaluation.predictions import Prediction
from fedmllm.evaluation.summary import primary_metric, summarise
from fedmllm.evaluation.transfer import TransferPredictions
from fedmllm.rng import stream
from fedmllm.runs.session import Session
from fedmllm.runs.suites import examine, without_models
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State, Tensors


class Evaluator:
    """Tests any number of models of one run. `seconds` is the time spent on it."""

    def __init__(self, session: Session, directory: RunDir) -> None:
        self._session, self._directory = session, directory
        self._config = session.config
        self.seconds = 0.0

    @property
    def metric(self) -> str:
        """The key of the task's metric in a summary."""
        return primary_metric(self._session.dataset.task)

    def sample_clients(self, clients: Sequence[int]) -> list[int]:
        """The clients whose own models are tested: all of them, or a draw of `eval.clients`."""
        count = min(self._config.eval.clients or len(clients), len(clients))
        drawn = stream(self._config.seed, "tested clients").choice(len(clients), size=count, replace=False)
        return sorted(clients[int(i)] for i in drawn)

    @contextmanager
    def _prepared(self, states: Sequence[State]) -> Iterator[list[Tensors]]:
        """The adapters of several models, all with the first one's fold set. Time inside the block is evaluation time."""
        began = time.monotonic()
        self._session.model.adapter.set_fold(fold_of(states[0]))
        yield [state["adapter"] for state in states]
        self.seconds += time.monotonic() - began

    def predict(self, states: Sequence[State]) -> list[list[Prediction]]:
        """The predictions of several models on the test set."""
        with self._prepared(states) as adapters:
            return list(self._session.test_set.predict_each(self._config.eval, adapters))

    def scores(self, done: int, rounds: int) -> bool:
        """Whether the round is scored after which `done` of `rounds` are done. The last one is, unless the final test is
        about the same model and samples."""
        every, session = self._config.eval.every, self._session
        if done == rounds:
            return every > 0 and (session.round_set is not session.test_set or self._config.train.keep != "last")
        return every > 0 and done % every == 0

    def score_round(self, states: Sequence[State]) -> dict[str, dict[str, Any]]:
        """The metrics of the models after a round, averaged over them, on the samples that rounds are scored on."""
        session, settings = self._session, self._config.eval
        with self._prepared(states) as adapters:
            models = list(session.round_set.predict_each(settings, adapters))
            return summarise(session.dataset.task, models, settings.match, session.round_set.choices)

    def transfer(self, states: Sequence[State]) -> list[TransferPredictions]:
        """The predictions of several models on the test sets of `eval.transfer`."""
        with self._prepared(states) as adapters:
            return self._session.transfer.predict_each(adapters)

    def examine(self, states: Sequence[State], owners: Sequence[int] = ()) -> dict[str, Any]:
        """What the suites of `eval.suites` find about several models; `owners` has their clients if every client has its own
        (`runs.suites.examine`)."""
        settings = self._config.eval
        if not states:
            why = "Clients that train alone keep no model, so that there is none to examine."
            return {name: without_models(why) for name in settings.suites or ()}
        with self._prepared(states) as adapters:
            predict = lambda tests: list(tests.predict_each(settings, adapters))  # noqa: E731 (as short as it is)
            models = [partial(self._using, adapter) for adapter in adapters]
            return examine(self._session, settings.suites or (), predict, models, owners)

    @contextmanager
    def _using(self, adapter: Tensors) -> Iterator[None]:
        self._session.model.adapter.set(adapter)
        yield

    def transfer_summary(self, models: Sequence[TransferPredictions]) -> dict[str, Any]:
        return dict(self._session.transfer.summary(models))

    def summarise(self, models: Sequence[Sequence[Prediction]], judged: bool = False) -> dict[str, dict[str, Any]]:
        """The metrics of the predictions, averaged over the models."""
        session = self._session
        return summarise(session.dataset.task, models, self._config.eval.match, session.test_set.choices, judged)

    def bootstrap_scores(self, models: Sequence[Sequence[Prediction]]) -> dict[str, list[float]]:
        """{pattern: the task's metric on the resamples that are common to all runs on these questions}."""
        positive, match = self._session.dataset.task.positive, self._config.eval.match
        by_pattern = {
            name: [[p for p in model if p.pattern == name] for model in models] for name in self._config.eval.patterns
        }
        return {
            name: bootstrap_scores(self.metric, positive, of_pattern, match=match) for name, of_pattern in by_pattern.items()
        }

    def score(self, metrics: dict[str, dict[str, Any]]) -> float:
        """The task's metric under the first pattern."""
        return float(metrics[self._config.eval.patterns[0]][self.metric])

    def judge(self, models: Sequence[Sequence[Prediction]]) -> Sequence[Sequence[Prediction]]:
        """The predictions with a judge's verdicts on the open questions, if the experiment names a judge."""
        judge = self._session.parts.judge
        if judge is None:
            return models
        self._session.progress("asking the judge", 0, 0, self._config.judge.name)
        cache, questions = JudgeCache(judge), {sample.id: sample.question for sample in self._session.dataset.test}
        judged = [cache.judge(predictions, questions) for predictions in models]
        self._directory.save_judgements(cache.judgements())
        return judged
