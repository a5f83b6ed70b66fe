"""Test a finished run again, on its own task or on another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fedmllm.config import Experiment, PartitionTable, ScenarioTable, read, validate
from fedmllm.data import manifest as manifests
from fedmllm.data.manifest import Manifest
from fedmllm.errors import RunError
from fedmllm.evaluation.predictions import Prediction
from fedmllm.evaluation.summary import summarise
from fedmllm.evaluation.test_set import TestSet
from fedmllm.experiment.parts import build, with_defaults
from fedmllm.progress import ProgressCallback, no_progress
from fedmllm.runs.session import Session
from fedmllm.runs.suites import Use, examine
from fedmllm.runs.trained import adapters_of, check_model
from fedmllm.storage.run_dir import RunDir


def reevaluate(
    run: RunDir, config: Experiment, progress: ProgressCallback = no_progress, *, trusted: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Test a finished run's adapter again, under `config.eval` and on `config.task`: {pattern: metrics}, and what the suites of
    `eval.suites` find.

    Raises RunError if the task is the run's own and its data changed since, or if the run has no adapter; and, unless the
    folder is `trusted`, if its model is a path or brings code.
    """
    if not trusted:
        check_model(config.model, run.config)
    raw = read(run.config)
    trained, config = with_defaults(validate(raw)), with_defaults(config)
    now, then = ((c.task, c.eval.split, c.eval.holds_out and c.eval.validation_share) for c in (config, trained))
    same_data = now == then
    if not same_data:
        # Nobody trains on the other task, so these clients need not be able to share it.
        single = {"partition": PartitionTable(name="iid", clients=1), "scenario": ScenarioTable(name="aligned")}
        config = config.model_copy(update=single)
    parts = build(config)
    progress("preparing data", 0, 0, "")
    dataset = parts.prepare()
    if same_data and run.manifest.is_file() and not _same(manifests.read(run.manifest), dataset.manifest, raw, trained):
        raise RunError(f"{run.path}: the data changed since this run; its adapter cannot be compared on it.")
    session = Session(parts, dataset, progress)
    session.prepare(session.clients, [])
    personal = adapters_of(run)
    folders = list(personal.values()) or [run.adapter]
    if not folders[0].is_dir() and run.result()["kind"] != "zero-shot":
        raise RunError(f"{run.path} has no adapter to evaluate: its kind is {run.result()['kind']!r}.")

    @contextmanager
    def using(folder: Path) -> Iterator[None]:
        session.model.adapter.load(folder)
        yield

    present = [partial(using, folder) for folder in folders if folder.is_dir()]
    models: Sequence[Use] = present or [session.model.without_adapter]

    def predict(tests: TestSet) -> list[list[Prediction]]:
        predictions = []
        for use in models:
            with use():
                predictions.append(tests.predict(config.eval))
        return predictions

    metrics = summarise(dataset.task, predict(session.test_set), config.eval.match, session.test_set.choices)
    return metrics, examine(session, config.eval.suites or (), predict, models, list(personal), same_data)


def _same(held: Manifest, now: Manifest, raw: dict[str, Any], trained: Experiment) -> bool:
    """Whether the run's data is unchanged, where `raw` is the run's file and `trained` what it means today.

    An earlier version did not write the options that the scenario or the partition has gained since, and drew without them:
    then only the samples are compared.
    """
    resolved = trained.resolved()
    if all(raw.get(table) == resolved[table] for table in ("scenario", "partition")):
        return held.digest() == now.digest()
    return sorted(held.ids.to_pylist()) == sorted(now.ids.to_pylist())
