"""The final model put to other tasks' test sets, which nobody trained on: does what is learnt on one task carry to another?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmllm.config import EvalTable
from fedmllm.data.prompts import Strategy
from fedmllm.data.samples import Sample, Task
from fedmllm.evaluation.predictions import Prediction, TestSet, primary_metric, summarise
from fedmllm.models.mllm import MLLM
from fedmllm.tensors import Tensors

TransferPredictions = dict[str, list[Prediction]]
"""task -> one model's predictions on its test set."""


class Transfer:
    """Other tasks' test sets, encoded once; without any it asks nothing."""

    def __init__(
        self,
        model: MLLM,
        sets: Mapping[str, tuple[Task, Sequence[Sample]]],
        settings: EvalTable,
        strategy: Strategy,
        max_length: int,
    ) -> None:
        """Raises DataError for a prompt that is too long. Pictures wait for `prepare_features`."""
        self._settings = settings
        self._tasks: dict[str, tuple[Task, TestSet]] = {}
        for name, (task, samples) in sets.items():
            self._tasks[name] = (task, TestSet(model, task, samples, settings.patterns, strategy, max_length))

    def predict_each(self, adapters: Sequence[Tensors]) -> list[TransferPredictions]:
        """What each adapter answers, under the fold that is set now; of one, it is set afterwards."""
        found = {name: list(e.predict_each(self._settings, adapters)) for name, (_, e) in self._tasks.items()}
        return [{name: models[i] for name, models in found.items()} for i in range(len(adapters))]

    def summary(self, models: Sequence[TransferPredictions], seed: int) -> dict[str, Mapping[str, Any]]:
        """{task: {"primary_metric", "metrics": as in result.json}}."""
        found: dict[str, Mapping[str, Any]] = {}
        for name, (task, _) in self._tasks.items():
            metrics = summarise(task, [answers[name] for answers in models], seed, self._settings.bootstrap)
            found[name] = {"primary_metric": primary_metric(task), "metrics": metrics}
        return found
