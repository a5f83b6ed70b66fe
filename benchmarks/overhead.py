"""What of a round is not training: sampling, messages, checks, aggregation, clients' memory, the checkpoint, the record.

    python benchmarks/overhead.py [experiments/quickstart.toml] [--rounds 6] [--repeats 3] [--json FILE]

Runs the experiment's rounds as `fedmllm run` does, once with checkpoints written while the next round trains, as they are,
and once waiting for each. `overhead` is the time of all rounds but the first that was not spent in local training, over the
time of these rounds: the median over the repeats and their range. FedAvg has the least to do, SCAFFOLD remembers a tensor
of the adapter's size for each client, FLoRA sends and writes a change of the base weights, FlexLoRA takes singular values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers.utils import logging

from fedmllm.algorithms import LocalResult
from fedmllm.config import read, validate
from fedmllm.experiment.parts import build
from fedmllm.fleets import inprocess
from fedmllm.models.mllm import MLLM
from fedmllm.runs.rounds import begin, federation_plan, prepare_run, train_rounds
from fedmllm.runs.session import Session
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State
from fedmllm.training.cohort import train_cohort
from fedmllm.training.local import LocalSettings, Work

ALGORITHMS = ("fedavg", "scaffold", "fedyogi", "flora", "flexlora")


class Watched(RunDir):
    """Notes when each round was handed over, and can wait until it is on the disk."""

    def __init__(self, path: Path, wait: bool) -> None:
        super().__init__(path)
        self.wait, self.ends, self.trained = wait, [0.0], [0.0]
        self.training = 0.0

    def save_round(self, record: Any, state: State, config_digest: str) -> None:
        super().save_round(record, state, config_digest)
        if self.wait:
            self.load_checkpoint()
        self.ends.append(time.perf_counter())
        self.trained.append(self.training)


def overhead(file: Path, algorithm: str, rounds: int, wait: bool, sessions: dict[str, Session]) -> float:
    """The share of the rounds after the first that is not training. The evaluation at the end is not part of a round."""
    if algorithm not in sessions:
        raw = read(file) | {"algorithm": {"name": algorithm}}
        parts = build(validate(raw | {"train": raw.get("train", {}) | {"rounds": rounds}}))
        sessions[algorithm] = Session(parts, parts.prepare())
    session = sessions[algorithm]
    with tempfile.TemporaryDirectory() as folder:
        directory = Watched(Path(folder) / "run", wait)

        def timed(model: MLLM, works: Sequence[Work], settings: LocalSettings) -> list[LocalResult]:
            began = time.perf_counter()
            results = train_cohort(model, works, settings)
            directory.training += time.perf_counter() - began
            return results

        run = prepare_run("federated", session, directory)
        with patch.object(inprocess, "train_cohort", timed), directory.claimed():
            begin(run)
            train_rounds(run, session.parts.algorithm, session.clients, federation_plan(session), "rounds")
    whole = directory.ends[-1] - directory.ends[1]
    return 1 - (directory.trained[-1] - directory.trained[1]) / whole


def main() -> None:
    parser = argparse.ArgumentParser(description="the share of a round that is not training")
    parser.add_argument("file", type=Path, nargs="?", default=Path("experiments/quickstart.toml"))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable_progress_bar()
    sessions: dict[str, Session] = {}
    shares: dict[str, dict[str, list[float]]] = {name: {"behind": [], "waited for": []} for name in ALGORITHMS}
    for _ in range(options.repeats):
        for name, found in shares.items():
            for how, each in found.items():
                each.append(overhead(options.file, name, options.rounds, how == "waited for", sessions))
    print(f"{'overhead of a round':22}{'checkpoint behind':>24}{'checkpoint waited for':>26}")
    for name, found in shares.items():
        cells = [f"{100 * statistics.median(e):5.2f} %  ({100 * min(e):.2f}–{100 * max(e):.2f})" for e in found.values()]
        print(f"{name:22}{cells[0]:>24}{cells[1]:>26}")
    if options.json:
        options.json.write_text(json.dumps(shares, indent=2) + "\n")


if __name__ == "__main__":
    main()
