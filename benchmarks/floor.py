"""How far local training is from the time that its arithmetic alone would take.

    python benchmarks/floor.py [experiments/quickstart.toml] [--clients 8] [--steps 12] [--repeats 5] [--profile]

The floor of a pass is the number of floating-point operations in its matrix products and attention, forward and backward, as
PyTorch counts them for the batches that are trained, divided by the rate at which this machine multiplies two 1024 × 1024
float32 matrices with the same number of threads. The script prints the measured time divided by the floor, for clients one by
one and in one pass, and the ratio between the two. `--profile` adds a table of where the time of one pass goes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

from fedmllm.algorithms import LocalRule
from fedmllm.config import TrainTable, read, validate
from fedmllm.experiment.parts import build
from fedmllm.rng import stream
from fedmllm.runs.session import Session
from fedmllm.training.batches import batch_epoch
from fedmllm.training.cohort import Work, train_cohort
from harness import counted_operations, experiment_parser, median_and_range, product_rate


def make_works(session: Session, clients: int, steps: int) -> list[Work]:
    """The full steps of each client's first epoch, repeated up to `steps`. Clients without a full step are left out."""
    batch_size = session.config.train.batch_size
    works = []
    for client in range(clients):
        data = session.clients[client]
        epoch = batch_epoch([sample.length for sample in data], batch_size, 1, stream(0, "floor", client)).steps
        full = [step for step in epoch if len(step[0]) == batch_size]
        if not full:
            continue
        chosen = [full[i % len(full)] for i in range(steps)]
        samples = [[[data[i] for i in batch] for batch in step] for step in chosen]
        works.append(Work(samples, session.initial, LocalRule(), client))
    return works


def train(session: Session, works: Sequence[Work], cohort: int, table: TrainTable) -> float:
    """Train all clients; the seconds it took."""
    began = time.perf_counter()
    for start in range(0, len(works), cohort):
        train_cohort(session.model, works[start : start + cohort], table)
    return time.perf_counter() - began


def main() -> None:
    parser = experiment_parser("Compare the time of local training with the time of its matrix products.")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="steps per client")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where the time of one pass goes")
    options = parser.parse_args()
    logging.disable_progress_bar()
    parts = build(validate(read(options.file)))
    session, table = Session(parts, parts.prepare()), parts.config.train
    session.prepare(session.clients, range(options.clients))
    works = make_works(session, options.clients, options.steps)
    tokens = sum(sample.length for work in works for step in work.steps for batch in step for sample in batch)
    with counted_operations() as counter:
        train(session, works, 1, table)
    operations = counter.get_total_flops()
    print(f"{len(works)} clients × {options.steps} steps of {table.batch_size}, threads: {torch.get_num_threads()}")
    print(f"{operations / tokens / 1e6:.1f} million operations per token of a sample, forward and backward")
    cohorts = {1: "one by one", len(works): f"{len(works)} in one pass"}
    to_floor: dict[int, list[float]] = {cohort: [] for cohort in cohorts}
    ratios = []
    for _ in range(options.repeats):
        floor = operations / product_rate(1024, torch.device("cpu"), torch.float32)
        seconds = {cohort: train(session, works, cohort, table) for cohort in cohorts}
        for cohort in cohorts:
            to_floor[cohort].append(seconds[cohort] / floor)
        ratios.append(seconds[1] / seconds[len(works)])
    for cohort, name in cohorts.items():
        print(f"{name + ' / floor':40}{median_and_range(to_floor[cohort], digits=1)}")
    print(f"{'one by one / ' + cohorts[len(works)]:40}{median_and_range(ratios)}")
    if options.profile:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            train(session, works, len(works), table)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=24, max_name_column_width=44))


if __name__ == "__main__":
    main()
