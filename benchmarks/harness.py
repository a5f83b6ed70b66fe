"""What several benchmarks share: their arguments, a run directory that records times, and the format of a ratio."""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State


def experiment_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the experiment file as its only argument; quickstart is the default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("file", type=Path, nargs="?", default=Path("experiments/quickstart.toml"), help="experiment file")
    return parser


class Clock(NamedTuple):
    """Seconds of wall time and of this process's processor time."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Clock:
        return cls(time.perf_counter(), time.process_time())


class TimedRunDir(RunDir):
    """Records the times at which its rounds end. With `wait`, a round ends when its checkpoint is on disk."""

    def __init__(self, path: Path, wait: bool = False) -> None:
        super().__init__(path)
        self.wait = wait
        self.began = 0.0
        """The wall time at which the first round began."""
        self.ends: list[Clock] = []

    def save_round(self, record: Mapping[str, Any], state: State, config_digest: str) -> None:
        if not self.ends:
            self.began = time.perf_counter() - record["seconds"]
        super().save_round(record, state, config_digest)
        if self.wait:
            self.load_checkpoint()
        self.ends.append(Clock.now())


def synchronize(device: torch.device) -> None:
    """Wait until the device has computed everything that was requested."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(size: int, device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Floating-point operations per second of a product of two matrices of size × size."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    synchronize(device)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(4):  # so that a GPU does not wait for the next product to be requested
            torch.mm(a, b)
        synchronize(device)
        count += 4
    return 2 * size**3 * count / (time.perf_counter() - began)


def counted_operations() -> FlopCounterMode:
    """A context in which `get_total_flops()` counts matrix products and attention, also the attention of CPUs and of outlines,
    for which PyTorch has no formula: a position attends to all others, whether or not a mask hides some of them."""

    def forward(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, out_shape: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    def backward(grad: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, q, k, v))

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formulas = {attention: forward, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that matter for speed, as far as they are installed."""
    installed = {"python": platform.python_version()}
    for package in ("fedmllm", "torch", "transformers", "peft", "accelerate", "flwr", "ray", "bitsandbytes", "torchvision"):
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def median_and_range(ratios: Sequence[float], digits: int = 2) -> str:
    """Such as "  1.85 × (1.21–1.88)"; a dash if the ratios are NaN, because nothing was measured."""
    if math.isnan(ratios[0]):
        return f"{'–':>6}"
    return f"{statistics.median(ratios):6.{digits}f} × ({min(ratios):.{digits}f}–{max(ratios):.{digits}f})"
