"""Test a finished run again, on its own task or on another."""

from __future__ import annotations

from typing import Any

from fedmllm.bench import Bench
from fedmllm.config import Experiment, Named, PartitionTable, read, validate
from fedmllm.data import manifest as manifests
from fedmllm.errors import RunError
from fedmllm.evaluation.evaluate import summarise
from fedmllm.experiment import Report, prepare, silent, with_defaults
from fedmllm.store import RunDir


def reevaluate(run: RunDir, config: Experiment, report: Report = silent) -> dict[str, Any]:
    """Test a finished run's adapter again, under `config.eval` and on `config.task`; {pattern: metrics}.

    Raises RunError where the run's own task is meant and its data changed since.
    """
    trained = with_defaults(validate(read(run.config)))
    known = (config.task, config.eval.split, config.eval.validation_share)
    if known != (trained.task, trained.eval.split, trained.eval.validation_share):
        # Nobody trains on the other task, so it need not be one that these clients could share.
        config = config.model_copy(
            update={"partition": PartitionTable(name="iid", clients=1), "scenario": Named(name="aligned")}
        )
        data = prepare(config)
    else:
        data = prepare(config)
        if run.manifest.is_file() and manifests.read(run.manifest).digest() != data.manifest.digest():
            raise RunError(f"{run.path}: the data changed since this run; its adapter cannot be compared on it.")
    bench = Bench(config, data, report)
    bench.prepare(bench.clients, [])
    own = sorted(run.adapters.glob("client-*"), key=lambda path: int(path.name.removeprefix("client-")))
    folders = own or [run.adapter]
    if not folders[0].is_dir() and run.result()["kind"] != "zero-shot":
        raise RunError(f"{run.path} has no adapter to evaluate: its kind is {run.result()['kind']!r}.")
    models = []
    for folder in folders:
        if folder.is_dir():
            bench.model.adapter.load(folder)
            models.append(bench.examination.take(config.eval))
    if not models:
        with bench.model.without_adapter():
            models.append(bench.examination.take(config.eval))
    return summarise(data.task, models, config.seed, config.eval.bootstrap)
