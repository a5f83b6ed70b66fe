"""(d) fedmllm as `fedmllm run` does it: experiment, data, encoded samples, the round loop with its checkpoints, evaluation.

`train.cohort = 1`: clients train one after the other. The time of the rounds includes every checkpoint and record that a
run directory gets; tokenising and the vision tower run once before, and that time is given beside it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from contenders.making import experiment
from contenders.workload import BATCH, Outcome, Workload, peak_memory_mb
from fedmllm.experiment import Bench, prepare
from fedmllm.runs import Runner
from fedmllm.store import RunDir


class Clock:
    """A `Report` that notes when each stage was last told of."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        self.last[stage] = time.perf_counter()


def run(workload: Workload, cohort: int | str = 1) -> Outcome:
    config, clock = experiment(workload.size, cohort), Clock()
    data = prepare(config)
    bench = Bench(config, data, clock)
    prepared = time.perf_counter() - clock.last["encoding samples"]
    bench.model.loss(bench.clients[0][:BATCH]).backward()  # type: ignore[no-untyped-call]  # warm up
    for parameter in bench.model.adapter.parameters.values():
        parameter.grad = None
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(config, data, bench, RunDir(Path(folder) / "run"), "federated", clock)
        runner.start()  # the description of the machine and the code, which asks git
        began = time.perf_counter()
        runner.execute()
        seconds = clock.last["rounds"] - began
        records = runner.run.rounds()
    # `execute` has evaluated once, which warmed up; the trained adapter is still set.
    began = time.perf_counter()
    predictions = bench.examination.take(config.eval)
    eval_seconds = time.perf_counter() - began
    accuracy = sum(p.correct for p in predictions) / len(predictions)
    losses, adapter = [float(record["loss"]) for record in records], bench.model.adapter.get()
    return Outcome(
        losses, adapter, seconds, eval_seconds, accuracy, torch.get_num_threads(), peak_memory_mb(), prepare_seconds=prepared
    )
