"""Rates and peak memory of several ways to do the same work, within a limited time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from gpu_kit.ways import Done
from harness import synchronize

Way = Callable[[], Done]
REPEATS = 5


@dataclass
class Measured:
    """`rates`: amount per second, one per repeat; `memory`: bytes at the peak, None on a CPU; `why`: what went wrong, if
    anything did."""

    rates: list[float] = field(default_factory=list)
    memory: int | None = None
    loss: float | None = None
    why: str | None = None


def measure(
    ways: Mapping[str, Way], device: torch.device, until: float, repeats: int = REPEATS
) -> Iterator[dict[str, Measured]]:
    """Run all ways in turn, once to warm up and then `repeats` times, as far as time allows; what is measured so far, again and
    again. `until` is a time of `time.monotonic`."""
    results: dict[str, Measured] = {}
    seconds: dict[str, float] = {}  # of each way's last run
    first: dict[str, float] = {}  # the rate of each way's first run
    for name, way in ways.items():
        results[name] = result = Measured()
        if time.monotonic() + max(seconds.values(), default=0.0) > until:
            result.why = "not measured: the time was used up"
            continue
        rate, seconds[name] = _run(way, result, device)
        if result.why is None:
            first[name] = rate
        yield results
    for _ in range(repeats):
        for name in first:
            if time.monotonic() + seconds[name] > until:
                continue
            rate, seconds[name] = _run(ways[name], results[name], device)
            if results[name].why is None:
                results[name].rates.append(rate)
            yield results
    for name, rate in first.items():
        if not results[name].rates:
            results[name].rates, results[name].why = [rate], "only the first run, which also warms up"
    yield results


def _run(way: Way, result: Measured, device: torch.device) -> tuple[float, float]:
    """(amount per second, seconds) of one run. If it fails, `result.why` says so and nothing is raised."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    amount = 0
    try:
        amount, result.loss = way()
        synchronize(device)
    except torch.OutOfMemoryError:
        result.why = "not measured: it does not fit in the device's memory"
    except Exception as error:  # the other ways are still worth measuring, and the machine may be lent for an hour only
        result.why = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    seconds = time.perf_counter() - began
    if on_gpu and result.why is None:
        result.memory = torch.cuda.max_memory_allocated(device)
    elif on_gpu:  # so that what is left of the failed run does not take memory from the next
        gc.collect()
        torch.cuda.empty_cache()
    return amount / seconds, seconds
