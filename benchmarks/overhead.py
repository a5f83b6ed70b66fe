"""The share of a round that is not training: sampling, messages, checks, aggregation, clients' memory, checkpoint, record.

    python benchmarks/overhead.py [experiments/quickstart.toml] [--rounds 6] [--repeats 3] [--json FILE]

Runs the experiment's rounds in the same way as `fedmllm run`, once with checkpoints written in the background while the next
round trains (the default behaviour), and once waiting for each checkpoint. The overhead is the share of the time of all rounds
except the first that was not spent in local training; printed are its median and range over the repeats. The algorithms
differ in what they add: FedAvg adds the least, SCAFFOLD stores a tensor of the adapter's size per client, FLoRA sends and
writes a change of the base weights, and FlexLoRA computes singular value decompositions.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from fedmllm.algorithms import LocalResult
from fedmllm.config import TrainTable, read, validate
from fedmllm.experiment.parts import build
from fedmllm.fleets.base import FleetBackend
from fedmllm.fleets.inprocess import InProcessFleet
from fedmllm.models.mllm import MLLM
from fedmllm.runs.rounds import begin, federation_plan, prepare_run, train_rounds
from fedmllm.runs.session import Session
from fedmllm.training.cohort import Work, train_cohort
from harness import TimedRunDir, experiment_parser

ALGORITHMS = ("fedavg", "scaffold", "fedyogi", "flora", "flexlora")
MODES = {"behind": "checkpoint in the background", "waited for": "checkpoint waited for"}
"""Key in the JSON file -> heading."""


def overhead(session: Session, wait: bool) -> float:
    """The share of the rounds after the first that is not training. The evaluation at the end is not part of a round."""
    training = [0.0] * session.config.train.rounds
    with tempfile.TemporaryDirectory() as folder:
        directory = TimedRunDir(Path(folder) / "run", wait)

        def timed(model: MLLM, works: Sequence[Work], table: TrainTable) -> list[LocalResult]:
            began = time.perf_counter()
            results = train_cohort(model, works, table)
            training[len(directory.ends)] += time.perf_counter() - began
            return results

        backend = FleetBackend(lambda context: InProcessFleet(context, timed))
        run = prepare_run("federated", session, directory, backend)
        with directory.claimed():
            begin(run)
            train_rounds(run, session.parts.algorithm, session.clients, federation_plan(session), "rounds")
    return 1 - sum(training[1:]) / (directory.ends[-1].wall - directory.ends[0].wall)


def open_session(file: Path, algorithm: str, rounds: int) -> Session:
    raw = read(file) | {"algorithm": {"name": algorithm}}
    parts = build(validate(raw | {"train": raw.get("train", {}) | {"rounds": rounds}}))
    return Session(parts, parts.prepare())


def main() -> None:
    parser = experiment_parser("Measure the share of a round that is not training.")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    options = parser.parse_args()
    logging.disable_progress_bar()
    sessions = {name: open_session(options.file, name, options.rounds) for name in ALGORITHMS}
    shares: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in MODES} for name in ALGORITHMS}
    for _ in range(options.repeats):
        for name, session in sessions.items():
            for mode in MODES:
                shares[name][mode].append(overhead(session, wait=mode == "waited for"))
    print(f"{'overhead of a round':22}" + "".join(f"{heading:>30}" for heading in MODES.values()))
    for name, by_mode in shares.items():
        cells = (f"{100 * statistics.median(s):5.2f} %  ({100 * min(s):.2f}–{100 * max(s):.2f})" for s in by_mode.values())
        print(f"{name:22}" + "".join(f"{cell:>30}" for cell in cells))
    if options.json:
        options.json.write_text(json.dumps(shares, indent=2) + "\n")


if __name__ == "__main__":
    main()
