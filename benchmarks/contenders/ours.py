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
from fedmllm.experiment.parts import build
from fedmllm.runs.rounds import begin, federation_plan, prepare_run, train_rounds
from fedmllm.runs.session import Session
from fedmllm.storage.run_dir import RunDir


class Clock:
    """A `Report` that notes when each stage was last told of."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        self.last[stage] = time.perf_counter()


def _warm_up(session: Session) -> None:
    """One forward and backward pass that leaves nothing behind."""
    session.model.loss(session.clients[0][:BATCH]).backward()
    for parameter in session.model.adapter.parameters.values():
        parameter.grad = None


def run(workload: Workload, cohort: int | str = 1) -> Outcome:
    config, clock = experiment(workload.size, cohort), Clock()
    parts = build(config)
    session = Session(parts, parts.prepare(), clock)
    questions = time.perf_counter() - clock.last["encoding questions"]
    with tempfile.TemporaryDirectory() as folder:
        directory, started = RunDir(Path(folder) / "run"), time.perf_counter()
        prepared = prepare_run("federated", session, directory)
        encoded = time.perf_counter()
        _warm_up(session)
        with directory.claimed():
            begin(prepared)
            began = time.perf_counter()
            train_rounds(prepared, parts.algorithm, session.clients, federation_plan(session), "rounds")
        records = directory.rounds()
        state = directory.load_checkpoint()
    assert state is not None
    adapter = state[1]["adapter"]
    list(session.test_set.predict_each(config.eval, [adapter]))  # warm-up
    evaluating = time.perf_counter()
    (predictions,) = session.test_set.predict_each(config.eval, [adapter])
    eval_seconds = time.perf_counter() - evaluating
    return Outcome(
        losses=[float(record["loss"]) for record in records],
        adapter=adapter,
        train_seconds=clock.last["rounds"] - began,
        eval_seconds=eval_seconds,
        accuracy=sum(p.correct for p in predictions) / len(predictions),
        threads=torch.get_num_threads(),
        peak_memory_mb=peak_memory_mb(),
        prepare_seconds=questions + encoded - started,
        cohort=prepared.cohort,
    )
