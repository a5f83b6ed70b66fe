"""(d) fedmllm in the same way as `fedmllm run`: experiment, data, encoded samples, rounds with checkpoints, evaluation.

With `train.cohort = 1`, clients train one after another. The time of the rounds includes all checkpoints and records that go to
a run directory. Tokenising and the vision tower run once beforehand, and their time is reported separately.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from contenders.experiment import experiment
from contenders.workload import BATCH, Outcome, Workload, peak_memory_mb
from fedmllm.experiment.parts import build
from fedmllm.runs.rounds import begin, federation_plan, prepare_run, train_rounds
from fedmllm.runs.session import Session
from fedmllm.storage.run_dir import RunDir


class StageTimes:
    """A `ProgressCallback` that records when each stage last reported."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        self.last[stage] = time.perf_counter()


def _warm_up(session: Session) -> None:
    """One forward and backward pass without effect on the training."""
    session.model.loss(session.clients[0][:BATCH]).backward()
    for parameter in session.model.adapter.parameters.values():
        parameter.grad = None


def run(workload: Workload, cohort: int | str = 1) -> Outcome:
    config, stages = experiment(workload.size, cohort), StageTimes()
    parts = build(config)
    session = Session(parts, parts.prepare(), stages)
    encoding_questions = time.perf_counter() - stages.last["encoding questions"]
    with tempfile.TemporaryDirectory() as folder:
        directory, began = RunDir(Path(folder) / "run"), time.perf_counter()
        prepared = prepare_run("federated", session, directory)
        encoding_samples = time.perf_counter() - began
        _warm_up(session)
        with directory.claimed():
            begin(prepared)
            rounds_began = time.perf_counter()
            train_rounds(prepared, parts.algorithm, session.clients, federation_plan(session), "rounds")
        records = directory.rounds()
        checkpoint = directory.load_checkpoint()
    assert checkpoint is not None
    adapter = checkpoint[1]["adapter"]
    list(session.test_set.predict_each(config.eval, [adapter]))  # warm up
    began = time.perf_counter()
    (predictions,) = session.test_set.predict_each(config.eval, [adapter])
    eval_seconds = time.perf_counter() - began
    return Outcome(
        losses=[float(record["loss"]) for record in records],
        adapter=adapter,
        train_seconds=stages.last["rounds"] - rounds_began,
        eval_seconds=eval_seconds,
        accuracy=sum(p.correct for p in predictions) / len(predictions),
        threads=torch.get_num_threads(),
        peak_memory_mb=peak_memory_mb(),
        prepare_seconds=encoding_questions + encoding_samples,
        cohort=prepared.cohort,
    )
