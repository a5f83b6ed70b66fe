"""The quickstart, three ways on one loaded model: untrained, each client alone, and federated.

`make demo` runs this. It is also how the package is used from Python: an experiment file gives the data and a bench, a
bench and a run directory give a run. Each of the three is what one command line would do:

    fedmllm baseline zero-shot experiments/quickstart.toml
    fedmllm baseline local experiments/quickstart.toml
    fedmllm run experiments/quickstart.toml
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

from fedmllm import config
from fedmllm.experiment import Bench, default_stem, options_of, prepare
from fedmllm.progress import Progress
from fedmllm.report.tables import comparison
from fedmllm.runs import Kind, Runner
from fedmllm.store import new_run

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.toml"
KINDS: tuple[Kind, ...] = ("zero-shot", "local", "federated")


def main() -> None:
    parser = argparse.ArgumentParser(description="zero-shot, local and federated on the quickstart experiment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the run directories go")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    began = time.monotonic()
    raw, _ = config.apply_overrides(config.read(QUICKSTART), [f"seed={arguments.seed}"], options_of)
    experiment = config.validate(raw, str(QUICKSTART))
    data = prepare(experiment)
    results, folders = {}, {}
    with Progress() as report:
        bench = Bench(experiment, data, report)
        for kind in KINDS:
            run = new_run(arguments.out, default_stem(experiment, kind))
            results[kind] = Runner(experiment, data, bench, run, kind, report).execute()
            folders[kind] = run.path
    Console(width=None if sys.stdout.isatty() else 140).print(comparison(list(results.values())))
    score = {kind: 100 * result["metrics"]["both"]["accuracy"] for kind, result in results.items()}
    for other, what in (("zero-shot", "the untrained model"), ("local", "the mean client alone")):
        print(f"federated is {score['federated'] - score[other]:+.1f} points from {what}")
    print(f"took {time.monotonic() - began:.0f} s; run directory of the federated run: {folders['federated']}")


if __name__ == "__main__":
    main()
