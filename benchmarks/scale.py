"""What a federation costs as it grows from 10 to 100,000 clients, of which 10 are sampled per round.

    python benchmarks/scale.py [--clients 10 1000 100000] [--rounds 10] [--json FILE]
    python benchmarks/scale.py --check 1000 1000000

Each setting runs in a process of its own, so that its peak memory is measured alone. It trains the pocket model with FedAvg or
SCAFFOLD (whose clients keep a control variate each) through the same steps as `fedmllm run`, from reading the data to
`result.json`.

All settings share one data set of 200,000 questions about 100 pictures, which is made beforehand and not timed. With 10 clients
each holds 20,000 samples, with 100,000 clients 2. To give a sampled client the same work in all settings, only the first 2
samples of each client are encoded and trained on, so the comparison shows what the number of clients costs. One difference
remains: with 10 clients the same ones return every round and SCAFFOLD loads their state, while with 100,000 clients hardly any
client is sampled twice.

`setup` is the time from reading the data to the start of the first round, and `memory` how far the process's peak is above that
of the smallest setting. `round` is the median time of the rounds after the first, including the checkpoint, relative to the
smallest setting; `CPU` is the same ratio for processor time, which does not depend on what else the machine does while the
settings run one after another. `with state` is the number of clients with stored state at the end.

With `--check`, it measures `fedmllm check` of files with so many lines instead: processor time and peak memory of the process.
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

SAMPLES, PICTURES, QUESTIONS = 200_000, 100, 20
SAMPLED, SAMPLES_PER_CLIENT = 10, 2
ALGORITHMS = ("fedavg", "scaffold")


def make_data(folder: Path, samples: int = SAMPLES) -> None:
    """Write `train.jsonl`, `test.jsonl` and the pictures to which they refer."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    colors = ("red", "blue", "green", "yellow")
    for number in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    for split, count in (("train", samples), ("test", QUESTIONS)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(count):
                line = {
                    "id": f"{split}-{i:06d}", "image": f"{i % PICTURES:02d}.png", "text": f"note {i:06d}",
                    "question": "which color is it?", "choices": colors, "answer": colors[i % len(colors)],
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")


def run_setting(folder: Path, algorithm: str, clients: int, rounds: int) -> dict[str, Any]:
    """One run in this process: its setup time, the time of each round after the first, and the peak memory."""
    from transformers.utils import logging

    from fedmllm.config import validate
    from fedmllm.experiment.parts import build
    from fedmllm.runs.kinds import execute
    from fedmllm.runs.session import ClientData, Session
    from harness import TimedRunDir

    logging.disable_progress_bar()
    parts = build(
        validate(
            {
                "name": f"{algorithm}-{clients}",
                "task": {"name": "jsonl", "train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")},
                "partition": {"name": "iid", "clients": clients},
                "algorithm": {"name": algorithm},
                "train": {"rounds": rounds, "clients_per_round": SAMPLED, "batch_size": SAMPLES_PER_CLIENT},
                "eval": {"bootstrap": 10},
            }
        )
    )
    with tempfile.TemporaryDirectory() as temporary:
        began = time.perf_counter()
        session = Session(parts, parts.prepare())
        manifest = session.dataset.manifest
        session.clients = ClientData(manifest, lambda holdings: session.encode(holdings[:SAMPLES_PER_CLIENT]))
        directory = TimedRunDir(Path(temporary) / "run")
        result = execute("federated", session, directory)
        assert len(result["per_client"]) == clients
        assert {record["examples"] for record in directory.rounds()} == {SAMPLED * SAMPLES_PER_CLIENT}
        with_state = len(list((directory.checkpoint / "clients").glob("client-*")))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {
        "algorithm": algorithm,
        "clients": clients,
        "setup_seconds": directory.began - began,
        "round_seconds": [after.wall - before.wall for before, after in pairwise(directory.ends)],
        "round_cpu_seconds": [after.cpu - before.cpu for before, after in pairwise(directory.ends)],
        "peak_mb": peak,
        "remembering": with_state,
    }


def measure(folder: Path, algorithm: str, clients: int, rounds: int) -> dict[str, Any]:
    """`run_setting` in a process of its own."""
    command = [sys.executable, __file__, "--one", str(folder), algorithm, str(clients), str(rounds)]
    env = {**os.environ, "FEDMLLM_CACHE": str(folder / "cache")}
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    if process.returncode:
        sys.exit(process.stderr)
    measured: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return measured


def measure_check(folder: Path, samples: int) -> tuple[float, float]:
    """(processor seconds, peak MB) of `fedmllm check` for a training file of so many lines, on 100 clients."""
    make_data(folder, samples)
    task = f'[task]\nname = "jsonl"\ntrain = "{folder}/train.jsonl"\ntest = "{folder}/test.jsonl"\n'
    (folder / "check.toml").write_text(f'name = "check"\n{task}[partition]\nname = "iid"\nclients = 100\n')
    command = [sys.executable, "-m", "fedmllm", "check", str(folder / "check.toml"), "--json"]
    env = {**os.environ, "FEDMLLM_CACHE": str(folder / "cache")}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"check ended with status {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def compare_with_smallest(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each setting with its ratios to the setting of the same algorithm with the fewest clients."""
    rows = []
    for setting in settings:
        same = [other for other in settings if other["algorithm"] == setting["algorithm"]]
        smallest = min(same, key=lambda other: int(other["clients"]))
        wall, cpu = (
            statistics.median(setting[key]) / statistics.median(smallest[key]) for key in ("round_seconds", "round_cpu_seconds")
        )
        growth = setting["peak_mb"] - smallest["peak_mb"]
        rows.append({**setting, "memory_growth_mb": growth, "round_ratio": wall, "round_cpu_ratio": cpu})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure setup, memory and rounds as the number of clients grows.")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 1_000, 100_000])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--check", type=int, nargs="+", metavar="LINES", help="measure `fedmllm check` of such files instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for lines in options.check or ():
            seconds, megabytes = measure_check(folder, lines)
            print(f"check of {lines:9,d} lines: {seconds:6.1f} s of processor time, {megabytes:5.0f} MB")
        if options.check:
            return
        make_data(folder)
        settings = [measure(folder, name, clients, options.rounds) for name in ALGORITHMS for clients in options.clients]
    rows = compare_with_smallest(settings)
    print(f"{'algorithm':10s} {'clients':>9s} {'setup':>9s} {'memory':>11s} {'round':>8s} {'CPU':>8s}   {'with state':>11s}")
    for row in rows:
        print(
            f"{row['algorithm']:10s} {row['clients']:9,d} {row['setup_seconds']:7.1f} s {row['memory_growth_mb']:+8.0f} MB "
            f"{row['round_ratio']:6.2f} × {row['round_cpu_ratio']:6.2f} ×   {row['remembering']:11,d}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        folder, name, clients, rounds = sys.argv[2:]
        print(json.dumps(run_setting(Path(folder), name, int(clients), int(rounds))))
    else:
        main()
