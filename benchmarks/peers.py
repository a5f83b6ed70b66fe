"""Compare fedmllm with other implementations on the same model, data, steps and machine.

    python benchmarks/peers.py [--repeats 3] [--rounds 2] [--clients 8] [--samples 16] [--only a,c,d] [--json FILE]

(a) follows the published reference code, (b) Flower's LLM example, (c) is a bare PyTorch loop, (d) is fedmllm with one client
at a time, (e) fedmllm with cohorts. `contenders/` has one file per contender, which says what was kept of the original.
Contenders run in turn, `--repeats` times, each in a process of its own. Ratios are computed within a repeat; printed are their
median and range over the repeats, and our goals with whether the medians reach them. Seconds mean nothing on a shared machine
and are only in the JSON file. The exit status is 1 if the contenders do not reach the same losses and adapter, because ratios
would then compare different work; a missed goal does not change it.

Training time covers the rounds only: imports, the first load of the model and the start of Ray do not count, but (b)'s load of
the model in every call does. What (d) and (e) encode once before the first round is counted in rows of its own. All contenders
are evaluated on the same questions: (a) and (b) generate every answer, (d) and (e) score closed questions and generate the
answers to open ones.

Each contender may use `--threads` threads, two by default; (b) uses one thread per client, which is its fastest setting.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from transformers.utils import logging

from contenders import CONTENDERS
from contenders.experiment import make_workload
from contenders.workload import Outcome, Size, Tensors, Workload
from harness import median_and_range, versions

LOSS_TOLERANCE = 1e-3
ADAPTER_TOLERANCE = 3e-3
Repeat = dict[str, Outcome]


def unavailable(letter: str) -> str | None:
    """Why this contender cannot run, as a sentence; None if it can."""
    if letter == "b" and not (find_spec("flwr") and find_spec("ray")):
        return 'Flower with Ray is not installed: python -m pip install -c requirements/constraints.txt -e ".[bench]"'
    return None


def run_contender(letter: str, workload: Path, out: Path, threads: int) -> Outcome:
    """Run one contender in a new process. If it fails, exit with the end of its output."""
    out.mkdir()
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
        "FEDMLLM_CACHE": str(out / "cache"),  # so that each contender computes its own vision features
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(out / "flwr"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # at Ray's own 15, (b) alone would wait for whatever else the machine does
    }  # fmt: skip
    command = [sys.executable, "-m", "contenders", letter, str(workload), str(out)]
    process = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"({letter}) failed:\n{process.stderr[-3000:]}")
    return Outcome.load(out)


# Whether all contenders did the same work


def distance(a: Tensors, b: Tensors) -> float:
    """The Euclidean norm of a − b."""
    assert a.keys() == b.keys(), "the adapters have different tensors"
    return math.sqrt(sum(float((a[name] - b[name]).double().pow(2).sum()) for name in a))


def disagreement(outcome: Outcome, reference: Outcome, initial: Tensors) -> tuple[float, float]:
    """(largest relative difference of a round's loss, distance of the adapters as a share of the trained distance)."""
    losses = max(abs(x - y) / abs(y) for x, y in zip(outcome.losses, reference.losses, strict=True))
    return losses, distance(outcome.adapter, reference.adapter) / distance(reference.adapter, initial)


def check(repeats: Sequence[Repeat], initial: Tensors) -> bool:
    """Whether all contenders reached the losses and the adapter of the first; prints by how much they differ."""
    first = next(iter(repeats[0]))
    agree = True
    for letter in list(repeats[0])[1:]:
        pairs = [disagreement(repeat[letter], repeat[first], initial) for repeat in repeats]
        losses, adapters = max(p[0] for p in pairs), max(p[1] for p in pairs)
        same = losses < LOSS_TOLERANCE and adapters < ADAPTER_TOLERANCE
        agree &= same
        verdict = "same work" if same else "NOT the same work"
        differences = f"losses differ by {losses:.1e}, adapters by {adapters:.1e} of the trained distance"
        print(f"  ({letter}) and ({first}): {differences}: {verdict}")
    return agree


# Ratios


def training(outcome: Outcome) -> float:
    return outcome.train_seconds


def evaluation(outcome: Outcome) -> float:
    return outcome.eval_seconds or math.nan


def training_and_encoding(outcome: Outcome) -> float:
    return outcome.train_seconds + outcome.prepare_seconds


Seconds = Callable[[Outcome], float]


class Ratio(NamedTuple):
    """The seconds of contender `over` divided by those of `under`, and what we want the ratio to be at least or at most."""

    what: str
    over: str
    under: str
    seconds: Seconds
    at_least: float | None = None
    at_most: float | None = None

    def verdict(self, ratios: Sequence[float]) -> str:
        """The goal and whether the median reaches it; empty if there is no goal."""
        median = statistics.median(ratios)
        if self.at_least is not None:
            return f"goal at least {self.at_least:g}: {'reached' if median >= self.at_least else 'MISSED'}"
        if self.at_most is not None:
            return f"goal at most {self.at_most:g}: {'reached' if median <= self.at_most else 'MISSED'}"
        return ""


RATIOS = [
    Ratio("training", "a", "d", training),
    Ratio("training", "b", "d", training),
    Ratio("training", "d", "c", training, at_most=0.8),
    Ratio("training", "a", "e", training, at_least=15),
    Ratio("training", "b", "e", training, at_least=10),
    Ratio("training", "d", "e", training),
    Ratio("training and encoding before it", "a", "d", training_and_encoding),
    Ratio("training and encoding before it", "b", "d", training_and_encoding),
    Ratio("training and encoding before it", "a", "e", training_and_encoding),
    Ratio("training and encoding before it", "b", "e", training_and_encoding),
    Ratio("evaluation: generated one by one / scored", "a", "d", evaluation),
    Ratio("evaluation: generated in batches / scored", "b", "d", evaluation, at_least=3),
]


def paired(repeats: Sequence[Repeat], over: str, under: str, seconds: Seconds) -> list[float]:
    """The ratio of the two contenders within each repeat."""
    return [seconds(repeat[over]) / seconds(repeat[under]) for repeat in repeats]


def print_table(repeats: Sequence[Repeat]) -> None:
    letters = list(repeats[0])
    base = "d" if "d" in letters else letters[0]
    columns = (f"training / ({base})", f"evaluation / ({base})", "memory", "accuracy")
    print(f"\n{'':68}{columns[0]:23}{columns[1]:23}{columns[2]:>8}{columns[3]:>10}")
    for letter in letters:
        outcomes = [repeat[letter] for repeat in repeats]
        cells = [median_and_range(paired(repeats, letter, base, seconds)) for seconds in (training, evaluation)]
        memory = statistics.median(o.peak_memory_mb for o in outcomes)
        accuracy = "–" if outcomes[0].accuracy is None else f"{100 * outcomes[0].accuracy:.1f} %"
        print(f"({letter}) {CONTENDERS[letter].description:64}{cells[0]:21}  {cells[1]:21}  {memory:5.0f} MB{accuracy:>10}")
    print()
    for ratio in RATIOS:
        if {ratio.over, ratio.under} <= set(letters):
            ratios = paired(repeats, ratio.over, ratio.under, ratio.seconds)
            what = f"({ratio.over})/({ratio.under})  {ratio.what:42}"
            print(f"  {what}{median_and_range(ratios):23}{ratio.verdict(ratios)}".rstrip())
    if "b" in letters:
        starts = [repeat["b"].startup_seconds / repeat["b"].train_seconds for repeat in repeats]
        print(f"  (b)      {'start of Ray (not counted) / training':42}{median_and_range(starts)}")


def all_measurements(workload: Workload, repeats: Sequence[Repeat], left_out: dict[str, str]) -> dict[str, object]:
    """The content of the JSON file."""
    first, letters = next(iter(repeats[0])), repeats[0].keys()
    outcomes = [{k: {n: v for n, v in vars(o).items() if n != "adapter"} for k, o in repeat.items()} for repeat in repeats]
    ratios = [
        {
            "what": ratio.what, "over": ratio.over, "under": ratio.under, "at_least": ratio.at_least, "at_most": ratio.at_most,
            "ratios": paired(repeats, ratio.over, ratio.under, ratio.seconds),
        }
        for ratio in RATIOS
        if {ratio.over, ratio.under} <= letters
    ]  # fmt: skip
    disagreements = [
        {k: disagreement(o, repeat[first], workload.initial) for k, o in repeat.items() if k != first} for repeat in repeats
    ]
    return {
        "size": vars(workload.size), "versions": versions(), "platform": platform.platform(), "cores": os.cpu_count(),
        "left_out": left_out, "repeats": outcomes, "ratios": ratios, "disagreement": disagreements,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compare fedmllm with other implementations on the same work, as ratios of seconds."
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8, help="number of clients, all of which take part in every round")
    parser.add_argument("--samples", type=int, default=16, help="samples per client, a multiple of 4")
    parser.add_argument("--questions", type=int, default=192, help="number of test questions")
    parser.add_argument("--cohort", type=int, help="clients that (e) trains in one pass; chosen automatically by default")
    parser.add_argument("--threads", type=int, default=2, help="threads per contender; (b) trains as many clients at a time")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders to run, such as a,c,d")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - CONTENDERS.keys():
        parser.error(f"--only: {min(unknown)!r} is not one of {', '.join(CONTENDERS)}")
    if options.samples % 4:
        parser.error("--samples: must be a multiple of 4, so that every step has 4 samples")
    logging.disable_progress_bar()
    left_out = {letter: why for letter in chosen if (why := unavailable(letter))}
    letters = [letter for letter in CONTENDERS if letter in chosen and letter not in left_out]
    for letter, why in left_out.items():
        print(f"({letter}) {CONTENDERS[letter].description} is left out: {why}.")
    size = Size(options.rounds, options.clients, options.samples, options.questions, options.cohort or "auto")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workload = make_workload(size)
        workload.save(folder)
        repeats: list[Repeat] = []
        for number in range(options.repeats):
            repeats.append({})
            for letter in letters:
                print(f"repeat {number + 1} of {options.repeats}: ({letter})", file=sys.stderr)
                repeats[-1][letter] = run_contender(letter, folder, folder / f"{letter}-{number}", options.threads)
    steps = size.rounds * size.clients * size.samples // 4
    print(f"\n{size.rounds} rounds of {size.clients} clients, {steps} steps of 4 samples")
    print(f"{len(repeats)} repeats, threads: {options.threads}")
    if "e" in letters:
        print(f"(e) trains {repeats[0]['e'].cohort} clients in one pass")
    print()
    agree = check(repeats, workload.initial)
    print_table(repeats)
    if options.json:
        options.json.write_text(json.dumps(all_measurements(workload, repeats, left_out), indent=2) + "\n")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
