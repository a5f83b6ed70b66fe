"""How far local training is from what the arithmetic alone would take.

    python benchmarks/floor.py [experiments/quickstart.toml] [--clients 8] [--steps 12] [--repeats 5] [--profile]

The floor of a pass is the number of multiplications and additions in its matrix products and attention, forward and backward,
as PyTorch counts them for the very batches that are trained, over the rate at which this machine multiplies two 1024 × 1024
float32 matrices with as many threads. Printed are the measured time over the floor, for clients one by one and in one pass, and
the same work's ratio between the two; `--profile` adds where the time of one pass goes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from fedmllm.algorithms import LocalRule
from fedmllm.config import Experiment, read, validate
from fedmllm.experiment.parts import build
from fedmllm.rng import stream
from fedmllm.runs.session import Session
from fedmllm.training.batches import batch_epoch
from fedmllm.training.cohort import train_cohort
from fedmllm.training.local import LocalSettings, Work


def product_rate(size: int = 1024, seconds: float = 0.5) -> float:
    """Floating-point operations a second of a float32 matrix product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        torch.mm(a, b)
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - began)


def works_of(bench: Session, config: Experiment, clients: int, steps: int) -> list[Work]:
    """The first full steps of each client, as its first round would take them."""
    made = []
    for client in range(clients):
        data = bench.clients[client]
        planned = batch_epoch([one.length for one in data], config.train.batch_size, 1, stream(0, "floor", client)).steps
        full = [step for step in planned if len(step[0]) == config.train.batch_size]
        if not full:
            continue
        rounds = [full[i % len(full)] for i in range(steps)]
        made.append(Work([[[data[i] for i in micro] for micro in step] for step in rounds], bench.initial, LocalRule(), client))
    return made


def train(bench: Session, works: Sequence[Work], cohort: int, settings: LocalSettings) -> float:
    """Seconds."""
    began = time.perf_counter()
    for start in range(0, len(works), cohort):
        train_cohort(bench.model, works[start : start + cohort], settings)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="local training over the time of its matrix products")
    parser.add_argument("file", type=Path, nargs="?", default=Path("experiments/quickstart.toml"))
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    logging.disable_progress_bar()
    parts = build(validate(read(options.file)))
    config, bench = parts.config, Session(parts, parts.prepare())
    bench.prepare(bench.clients, range(options.clients))
    settings = LocalSettings.of(config.train, config.train.lr)
    works = works_of(bench, config, options.clients, options.steps)
    tokens = sum(one.length for work in works for step in work.steps for micro in step for one in micro)
    with FlopCounterMode(display=False) as counter:
        train(bench, works, 1, settings)
    print(f"{len(works)} clients × {options.steps} steps of {config.train.batch_size}, threads: {torch.get_num_threads()}")
    print(f"{counter.get_total_flops() / tokens / 1e6:.1f} million operations a token of a sample, forward and backward")
    names = {1: "one by one", len(works): f"{len(works)} in one pass"}
    over: dict[int, list[float]] = {cohort: [] for cohort in names}
    ratios = []
    for _ in range(options.repeats):
        floor = counter.get_total_flops() / product_rate()
        seconds = {cohort: train(bench, works, cohort, settings) for cohort in names}
        for cohort, taken in seconds.items():
            over[cohort].append(taken / floor)
        ratios.append(seconds[1] / seconds[len(works)])
    for cohort, name in names.items():
        spread = f"({min(over[cohort]):.1f} to {max(over[cohort]):.1f})"
        print(f"{name + ' / floor':40}{statistics.median(over[cohort]):6.1f} ×  {spread}")
    spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{'one by one / ' + names[len(works)]:40}{statistics.median(ratios):6.2f} ×  {spread}")
    if options.profile:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            train(bench, works, len(works), settings)
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=24, max_name_column_width=44))


if __name__ == "__main__":
    main()
