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
from fedmllm.bench import Bench
from fedmllm.experiment import prepare
from fedmllm.runs import Runner
from fedmllm.store import RunDir


class Clock:
    """A `Report` that notes when each stage was last told of."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        self.last[stage] = time.perf_counter()


class TimedRunner(Runner):
    """Notes when all is encoded and when the rounds begin. Between the two are a warm-up and the description of the machine."""

    encoded = began = 0.0

    def start(self) -> None:
        self.encoded = time.perf_counter()
        super().start()
        model = self.bench.model
        model.loss(self.bench.clients[0][:BATCH]).backward()
        for parameter in model.adapter.parameters.values():
            parameter.grad = None
        self.began = time.perf_counter()


def run(workload: Workload, cohort: int | str = 1) -> Outcome:
    config, clock = experiment(workload.size, cohort), Clock()
    data = prepare(config)
    bench = Bench(config, data, clock)
    with tempfile.TemporaryDirectory() as folder:
        runner = TimedRunner(config, data, bench, RunDir(Path(folder) / "run"), "federated", clock)
        questions = time.perf_counter() - clock.last["encoding questions"]
        executed = time.perf_counter()
        result = runner.execute()
        records = runner.run.rounds()
    # `execute` has evaluated once, which warmed up; the trained adapter is still set.
    began = time.perf_counter()
    predictions = bench.examination.take(config.eval)
    eval_seconds = time.perf_counter() - began
    return Outcome(
        losses=[float(record["loss"]) for record in records],
        adapter=bench.model.adapter.get(),
        train_seconds=clock.last["rounds"] - runner.began,
        eval_seconds=eval_seconds,
        accuracy=sum(p.correct for p in predictions) / len(predictions),
        threads=torch.get_num_threads(),
        peak_memory_mb=peak_memory_mb(),
        prepare_seconds=questions + runner.encoded - executed,
        cohort=result["cohort"],
    )
