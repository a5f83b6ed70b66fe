"""What fedmllm reaches on a GPU, at the shapes of SmolVLM-500M, SmolVLM-2.2B and Qwen2.5-VL-3B with random weights in bfloat16.

    PYTHONPATH=. python benchmarks/gpu.py --out FOLDER [--minutes 9] [--shapes smolvlm-2.2b,…] [--profile]
    PYTHONPATH=. python benchmarks/gpu.py --tiny        # the same with models of toy size on a CPU

Trains one client by the published pattern, by a bare PyTorch and PEFT loop and by fedmllm, then cohorts with and without
checkpointing; answers questions by generation and by scoring; compiles the bare loop; and trains on weights in 4 bits if
bitsandbytes is installed. For each way it prints tokens (questions) a second, the share of the rate of a large bfloat16 matrix
product on this device, the peak of memory, and the ratio to fedmllm with one client at a time, within one run. It also prints
the number of tokens beyond which a larger cohort is no faster, which belongs in training/capacity.py.

All ways take turns in one process on one model in memory; a way that does not fit or fails is skipped with a sentence. Whatever
is measured is written to FOLDER/gpu.json at once, so that a killed run keeps it. Nothing is downloaded, and the run ends after
`--minutes`. The exit status is 1 if a way failed, or if ways that do the same work reach different losses.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

from contenders.workload import BATCH
from fedmllm.errors import ConfigError
from fedmllm.training import capacity
from gpu_kit.measuring import Measured, Way, measure
from gpu_kit.report import Report, enough_tokens, print_rows
from gpu_kit.shapes import PICTURE_SIZE, SHAPES, make
from gpu_kit.ways import STEPS, Bench, compiled, eager, make_bench, quantized
from harness import product_rate, versions

COHORTS = (1, 2, 4, 8, 16)
CHECKPOINTED = (1, 4, 16)
BARE = "bare PyTorch and PEFT loop"
ONE = "fedmllm, one client at a time"
SCORED = "fedmllm, scored (closed questions)"
COMPILING = 45.0
"""Seconds that compiling may take; it is left out if less time remains."""


def cohort_name(clients: int) -> str:
    return ONE if clients == 1 else f"fedmllm, {clients} clients in one pass"


def training_ways(bench: Bench) -> dict[str, Way]:
    ways: dict[str, Way] = {
        "published pattern: a Trainer for each client, batches of 1": bench.published,
        BARE: partial(bench.bare, bench.prepared()),
    }
    ways |= {cohort_name(clients): partial(bench.ours, clients) for clients in COHORTS}
    return ways | {f"{cohort_name(clients)}, checkpointing": partial(bench.checkpointed, clients) for clients in CHECKPOINTED}


def answering_ways(bench: Bench) -> dict[str, Way]:
    return {
        "published pattern: generated one by one": bench.generated_singly,
        "fedmllm, generated in one batch (open questions)": bench.generated_together,
        SCORED: bench.scored,
    }


class Shape:
    """The measurements at one shape. The parts run in the order of their worth, because time may run out."""

    def __init__(self, name: str, report: Report, device: torch.device, options: argparse.Namespace, until: float) -> None:
        self._name, self._report, self._device, self._options, self._until = name, report, device, options, until
        self._parts: dict[str, dict[str, Measured]] = {}
        self._record: dict[str, Any] = {"parts": self._parts}
        report.content["shapes"][name] = self._record

    def run(self, folder: Path) -> None:
        began, size = time.monotonic(), PICTURE_SIZE[self._options.tiny]
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        bench = make_bench(make(self._name, self._device, dtype, self._options.tiny), folder, size)
        parameters = sum(p.numel() for p in bench.model.model.parameters())
        operations, peak = bench.operations_per_token(), self._report.content["peak"]
        self._record |= {"parameters": parameters, "length": bench.length, "operations_per_token": operations}
        self._record["seconds_to_make"] = time.monotonic() - began
        work = f"{parameters / 1e9:.2f} billion parameters, {STEPS} steps of {BATCH} samples of {bench.length} tokens a client"
        print(f"\n{self._name}: {work}", flush=True)

        trained = self._measure("training", training_ways(bench), 0.65)
        self._record["enough_tokens"] = enough_tokens({c: trained[cohort_name(c)] for c in COHORTS}, bench.length)
        print_rows(trained, ONE, operations, peak)
        print_rows(self._measure("answering", answering_ways(bench), 0.35), SCORED)
        if self._options.profile:
            self._report.save_profile(self._name, profiled(partial(bench.ours, 4), self._device))
        if self._options.compile:
            print_rows(self._compile(bench), BARE, operations, peak)
        try:
            bench = make_bench(quantized(bench.model, folder / "model"), folder, size)
        except ConfigError as error:
            self._record["not_in_4_bits"] = str(error)
            print(f"\nWeights in 4 bits are not measured: {error}")
        else:
            ways: dict[str, Way] = {cohort_name(clients): partial(bench.ours, clients) for clients in (1, 8)}
            print_rows(self._measure("4 bits", ways, 1.0), ONE, operations, peak)

    def _measure(self, part: str, ways: Mapping[str, Way], share: float) -> dict[str, Measured]:
        """Measure within `share` of the time that is left, and save after every run."""
        now = time.monotonic()
        for results in measure(ways, self._device, now + share * (self._until - now)):
            self._parts[part] = results
            self._report.save()
        return self._parts[part]

    def _compile(self, bench: Bench) -> dict[str, Measured]:
        if self._until - time.monotonic() < COMPILING:
            print("\nThe compiled loop is not measured: too little time is left.")
            return {}
        loop = partial(bench.bare, bench.prepared())
        with compiled(bench.model):
            return self._measure("compiled", {BARE: eager(loop), f"{BARE}, compiled": loop}, 0.7)


def profiled(way: Way, device: torch.device) -> str:
    """Where the time of one run goes, by operation."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        way()
    return str(profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=40, max_name_column_width=60))


def print_line_to_change(report: Report) -> None:
    """The limit for `train.cohort = "auto"`: that of the shape whose passes must be larger."""
    best = [shape["enough_tokens"] for shape in report.content["shapes"].values() if shape.get("enough_tokens")]
    if best:
        tokens, rising = max(best)
        line = f'_ENOUGH_TOKENS = {{"cpu": {capacity._ENOUGH_TOKENS["cpu"]}, "cuda": {tokens}}}'
        report.content["line_for_capacity"] = line
        print(f"\nPasses of more than {tokens} tokens are no faster. In src/fedmllm/training/capacity.py, set\n{line}")
        if rising:
            print("The rate still rose at the largest cohort that was measured, so the limit may be higher.")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure training and evaluation at the shapes of real models on a GPU.")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and profiles")
    parser.add_argument("--minutes", type=float, default=9.0, help="the run ends after this time")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tiny", action="store_true", help="models of toy size, on a CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="also measure torch.compile")
    parser.add_argument("--profile", action="store_true", help="write where the time of a pass goes, for each shape")
    options = parser.parse_args()
    names = options.shapes.split(",")
    if unknown := set(names) - SHAPES.keys():
        parser.error(f"--shapes: {min(unknown)!r} is not one of {', '.join(SHAPES)}")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use; --tiny tries everything else on a CPU")
    began, limit = time.monotonic(), 60 * options.minutes
    device = torch.device("cpu" if options.tiny else "cuda")
    size, dtype = (256, torch.float32) if options.tiny else (8192, torch.bfloat16)
    peak = product_rate(size, device, dtype)
    facts = {"device": platform.processor() or platform.machine(), "versions": versions(), "peak": peak, "tiny": options.tiny}
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device), "memory": capacity.device_memory(device)}
    report = Report(options.out, facts)
    report.save()
    print(f"{facts['device']}: {peak / 1e12:.3g} × 10¹² operations a second in products of {size} × {size} ({dtype})")
    # A signal to this thread also ends a wait, such as that for a compiler in another process.
    timer = threading.Timer(limit, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    timer.start()
    try:
        for index, name in enumerate(names):
            now = time.monotonic()
            until = now + (began + 0.97 * limit - now) / (len(names) - index)
            run_shape(name, report, device, options, until)
    except KeyboardInterrupt:
        print("\nStopped: the time is used up, or the run was interrupted.")
    else:
        report.content["finished"] = True
    finally:
        timer.cancel()
        print_line_to_change(report)
        report.save()
    for line in report.failures():
        print(line, file=sys.stderr)
    return 1 if report.failures() else 0


def run_shape(name: str, report: Report, device: torch.device, options: argparse.Namespace, until: float) -> None:
    """Measure one shape. If it cannot even be built, the report says why, and the next one has its turn."""
    before = os.environ.get("FEDMLLM_CACHE")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["FEDMLLM_CACHE"] = temporary
        try:
            Shape(name, report, device, options, until).run(Path(temporary))
        except Exception as error:
            report.content["shapes"][name]["failed"] = why = f"failed: {type(error).__name__}: {error}"
            print(f"\n{name} {why}")
        finally:
            os.environ.pop("FEDMLLM_CACHE")
            if before is not None:
                os.environ["FEDMLLM_CACHE"] = before
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # a Trainer would use all GPUs
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(main())
