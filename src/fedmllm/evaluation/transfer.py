"""Evaluation on the test sets of other tasks, which no client trained on: does training on one task carry over to another?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fedmllm.config import EvalTable, TrainTable
from fedmllm.data.prompts import Strategy
from fedmllm.data.samples import Sample, Task
from fedmllm.evaluation.predictions import Prediction
from fedmllm.evaluation.summary import primary_metric, summarise
from fedmllm.evaluation.test_set import TestSet
from fedmllm.models.mllm import MLLM
from fedmllm.tensors import Tensors

TransferPredictions = dict[str, list[Prediction]]
"""task -> one model's predictions on that task's test set."""


class Transfer:
    """The test sets of any number of other tasks, encoded once."""

    def __init__(
        self,
        model: MLLM,
        sets: Mapping[str, tuple[Task, Sequence[Sample]]],
        settings: EvalTable,
        strategy: Strategy,
        train: TrainTable,
        on_bad_sample: Mapping[str, Literal["error", "skip"]],
    ) -> None:
        """Raises DataError if the model cannot be asked about a sample, unless `on_bad_sample` of its task is "skip".

        The pictures are encoded later, by `prepare_features`.
        """
        self._settings = settings
        self._tasks = {
            name: (task, TestSet(model, task, samples, settings.patterns, strategy, train, on_bad_sample[name]))
            for name, (task, samples) in sets.items()
        }

    def predict_each(self, adapters: Sequence[Tensors]) -> list[TransferPredictions]:
        """The predictions of each adapter, under the current fold. A single adapter is still set afterwards."""
        by_task = {name: list(tests.predict_each(self._settings, adapters)) for name, (_, tests) in self._tasks.items()}
        return [{name: models[i] for name, models in by_task.items()} for i in range(len(adapters))]

    def summary(self, models: Sequence[TransferPredictions]) -> dict[str, Mapping[str, Any]]:
        """{task: {"primary_metric", "metrics": as in result.json}}."""
        summaries: dict[str, Mapping[str, Any]] = {}
        for name, (task, tests) in self._tasks.items():
            metrics = summarise(task, [predictions[name] for predictions in models], self._settings.match, tests.choices)
            summaries[name] = {"primary_metric": primary_metric(task), "metrics": metrics}
        return summaries
