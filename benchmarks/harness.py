"""What several benchmarks share: their arguments, a run directory that records times, and the format of a ratio."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


def median_and_range(ratios: Sequence[float], digits: int = 2) -> str:
    """Such as "  1.85 × (1.21–1.88)"; a dash if the ratios are NaN, because nothing was measured."""
    if math.isnan(ratios[0]):
        return f"{'–':>6}"
    return f"{statistics.median(ratios):6.{digits}f} × ({min(ratios):.{digits}f}–{max(ratios):.{digits}f})"
