"""Run the quickstart three ways: the untrained model, each client alone, and federated. `make demo` runs this script.

It runs the commands that the README shows; the two that train run at the same time with half of the cores each:

    fedmllm baseline zero-shot experiments/quickstart.toml
    fedmllm baseline local experiments/quickstart.toml
    fedmllm run experiments/quickstart.toml
    fedmllm compare …
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from fedmllm.storage.run_dir import new_run

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.toml"
COMMANDS = {"zero-shot": ["baseline", "zero-shot"], "local": ["baseline", "local"], "federated": ["run"]}


class Run:
    """One `fedmllm` process. Its progress is printed line by line, prefixed with its kind."""

    def __init__(self, kind: str, seed: int, out: Path, threads: int) -> None:
        self.kind, self.folder = kind, out / f"quickstart-{kind}-seed{seed}"
        arguments = [*COMMANDS[kind], str(QUICKSTART), "--set", f"seed={seed}", "--out", str(self.folder), "--json"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedmllm", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self._watcher = threading.Thread(target=self._print_progress, daemon=True)
        self._watcher.start()

    def _print_progress(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            print(f"{self.kind:>9} | {line}", end="", file=sys.stderr, flush=True)

    def accuracy(self) -> float:
        """Wait for the process and return the accuracy in percent. Exits with the process's status if it failed."""
        status = self._process.wait()
        self._watcher.join()
        if status:
            sys.exit(status)
        result = json.loads((self.folder / "result.json").read_text())
        return 100 * float(result["metrics"]["both"]["accuracy"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="zero-shot, local and federated on the quickstart experiment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the run directories; by default a new one in runs/")
    options = parser.parse_args(arguments)
    out = options.out or new_run(Path("runs"), "demo").path
    began, cores = time.monotonic(), os.cpu_count() or 1
    # Zero-shot runs first and alone: it also encodes the pictures, and the other two runs reuse these features.
    scores = {"zero-shot": Run("zero-shot", options.seed, out, cores).accuracy()}
    trained = [Run(kind, options.seed, out, max(1, cores // 2)) for kind in ("local", "federated")]
    scores |= {run.kind: run.accuracy() for run in trained}
    folders = [str(out / f"quickstart-{kind}-seed{options.seed}") for kind in COMMANDS]
    subprocess.run([sys.executable, "-m", "fedmllm", "compare", *folders], check=True)
    for baseline, description in (("zero-shot", "the untrained model"), ("local", "the mean of clients trained alone")):
        print(f"federated: {scores['federated'] - scores[baseline]:+.1f} points relative to {description}")
    print(f"took {time.monotonic() - began:.0f} s; the runs are in {out}/")


if __name__ == "__main__":
    main()
