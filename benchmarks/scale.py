"""What a federation costs as its clients grow from 10 to 100,000 while 10 of them are sampled a round.

    python benchmarks/scale.py [--clients 10 1000 100000] [--rounds 10] [--json FILE]

One process a setting, so that the peak of its memory is its own: the pocket model, FedAvg and SCAFFOLD (whose clients
remember a control variate each), through the same steps as `fedmllm run`, from reading the data to `result.json`.

All settings share one data set, 200,000 questions about 100 pictures, made beforehand and not timed. Dealt to 10 clients
that is 20,000 samples each, to 100,000 clients 2 each. So that a sampled client does the same work in all settings, it is
given the first 2 samples of what it holds, both to encode and to train on: what is compared is the cost of there being
more clients. One difference stays: with 10 clients the same ones come back every round and SCAFFOLD reads what they
remember, with 100,000 hardly anyone is met twice.

`setup` is the time from reading the data to the start of the first round, `memory` the growth of the process's peak over
the smallest setting, `round` the median over the rounds after the first, checkpoint included, as a ratio to the smallest
setting, and `CPU` the same of the process's own time: the settings run one after the other, and what else the machine does
shows in the first. `remembering` is how many clients have a memory at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

SAMPLES, PICTURES, TESTS, EACH, SAMPLED = 200_000, 100, 20, 2, 10
ALGORITHMS = ("fedavg", "scaffold")


def make_data(folder: Path) -> None:
    """`train.jsonl`, `test.jsonl` and the pictures they name."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    colors = ("red", "blue", "green", "yellow")
    for number in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    for split, count in (("train", SAMPLES), ("test", TESTS)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(count):
                line = {
                    "id": f"{split}-{i:06d}", "image": f"{i % PICTURES:02d}.png", "text": f"note {i:06d}",
                    "question": "which color is it?", "choices": colors, "answer": colors[i % len(colors)],
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")


def run_setting(folder: Path, algorithm: str, clients: int, rounds: int) -> dict[str, Any]:
    """One run in this process: seconds of setup, of each round after the first, and the peak memory in MB."""
    from transformers.utils import logging

    from fedmllm.config import validate
    from fedmllm.experiment.parts import build
    from fedmllm.runs.kinds import execute
    from fedmllm.runs.session import ClientData, Session
    from fedmllm.storage.run_dir import RunDir
    from fedmllm.tensors import State

    class Watched(RunDir):
        """Notes when the first round began and when each checkpoint was there."""

        first_round = 0.0
        saved: tuple[tuple[float, float], ...] = ()

        def save_round(self, record: Mapping[str, Any], state: State, config_digest: str) -> None:
            self.first_round = self.first_round or time.perf_counter() - record["seconds"]
            super().save_round(record, state, config_digest)
            self.saved += ((time.perf_counter(), time.process_time()),)

    logging.disable_progress_bar()
    parts = build(
        validate(
            {
                "name": f"{algorithm}-{clients}",
                "task": {"name": "jsonl", "train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")},
                "partition": {"name": "iid", "clients": clients},
                "algorithm": {"name": algorithm},
                "train": {"rounds": rounds, "clients_per_round": SAMPLED, "batch_size": EACH},
                "eval": {"bootstrap": 10},
            }
        )
    )
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        session = Session(parts, parts.prepare())
        session.clients = ClientData(session.dataset.manifest, lambda holdings: session.encode(holdings[:EACH]))
        run = Watched(Path(place) / "run")
        result = execute("federated", session, run)
        assert len(result["per_client"]) == clients
        assert {record["examples"] for record in run.rounds()} == {SAMPLED * EACH}
        remembering = len(list((run.checkpoint / "clients").glob("client-*")))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {
        "algorithm": algorithm,
        "clients": clients,
        "setup_seconds": run.first_round - began,
        "round_seconds": [after[0] - before[0] for before, after in pairwise(run.saved)],
        "round_cpu_seconds": [after[1] - before[1] for before, after in pairwise(run.saved)],
        "peak_mb": peak,
        "remembering": remembering,
    }


def measure(folder: Path, algorithm: str, clients: int, rounds: int) -> dict[str, Any]:
    """`run_setting` in a process of its own."""
    asked = [sys.executable, __file__, "--one", str(folder), algorithm, str(clients), str(rounds)]
    done = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, "FEDMLLM_CACHE": str(folder / "cache")})
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def against_smallest(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each setting beside that of the fewest clients under the same algorithm."""
    rows = []
    for one in settings:
        base = min((other for other in settings if other["algorithm"] == one["algorithm"]), key=lambda s: int(s["clients"]))
        wall, cpu = (
            statistics.median(one[key]) / statistics.median(base[key]) for key in ("round_seconds", "round_cpu_seconds")
        )
        growth = one["peak_mb"] - base["peak_mb"]
        rows.append({**one, "memory_growth_mb": growth, "round_ratio": wall, "round_cpu_ratio": cpu})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="setup, memory and rounds as the clients grow")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 1_000, 100_000])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write all measurements there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_data(folder)
        settings = [measure(folder, name, clients, options.rounds) for name in ALGORITHMS for clients in options.clients]
    rows = against_smallest(settings)
    print(f"{'algorithm':10s} {'clients':>9s} {'setup':>9s} {'memory':>11s} {'round':>8s} {'CPU':>8s}   {'remembering':>11s}")
    for row in rows:
        print(
            f"{row['algorithm']:10s} {row['clients']:9,d} {row['setup_seconds']:7.1f} s {row['memory_growth_mb']:+8.0f} MB "
            f"{row['round_ratio']:6.2f} × {row['round_cpu_ratio']:6.2f} ×   {row['remembering']:11,d}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        where, name, clients, rounds = sys.argv[2:]
        print(json.dumps(run_setting(Path(where), name, int(clients), int(rounds))))
    else:
        main()
