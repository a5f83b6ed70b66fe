"""What the models of finished runs answered, read once per run, for paired tests on the same test samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmllm.errors import RunError
from fedmllm.report.grids import GridRow
from fedmllm.report.paired_tests import Answered
from fedmllm.storage.run_dir import RunDir


@dataclass(frozen=True)
class RunAnswers:
    """The answers of one run's models under one pattern. `ids` and `truth` are the test samples and their correct answers."""

    metric: str
    positive: str | None
    ids: tuple[str, ...]
    truth: tuple[str, ...]
    models: tuple[Answered, ...]

    @property
    def test(self) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """The metric and the test samples. Scores of runs that differ in them have no common mean."""
        return self.metric, self.ids, self.truth


def read_answers(run: RunDir, pattern: str) -> RunAnswers:
    """Raises RunError if the run is not complete, has no predictions under the pattern, or lacks what AUC needs."""
    result = run.result()
    lines = [line for line in run.predictions() if line["pattern"] == pattern]
    if not lines:
        raise RunError(f"{run.path}: predictions.jsonl has none under the pattern {pattern!r}; run the experiment again.")
    metric, positive = result["primary_metric"], result.get("positive")
    if metric == "auc" and not positive:
        raise RunError(f"{run.path}: result.json does not name the positive answer; run the experiment again.")
    models: dict[Any, list[Mapping[str, Any]]] = {}
    for line in lines:
        models.setdefault(line.get("client"), []).append(line)
    first = next(iter(models.values()))
    answered = tuple(
        Answered(
            np.array([line["predicted"] if not line["correct"] else line["answer"] for line in of_model]),
            np.array([np.nan if line["score"] is None else line["score"] for line in of_model], dtype=np.float64),
        )
        for of_model in models.values()
    )
    return RunAnswers(metric, positive, tuple(line["id"] for line in first), tuple(line["answer"] for line in first), answered)


class AnswerCache:
    """The answers of a sweep's runs, each read once however often it is compared."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._answers: dict[str, RunAnswers] = {}

    def __call__(self, row: GridRow) -> list[RunAnswers]:
        """The answers of the row's complete runs."""
        for name in row.ids:
            if name not in self._answers:
                self._answers[name] = read_answers(RunDir(self._folder / name), row.pattern)
        return [self._answers[name] for name in row.ids]
