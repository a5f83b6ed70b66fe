"""fedmllm beside its peers: the same model, data, steps and machine, and the same losses and adapter at the end.

    python benchmarks/peers.py [--repeats 3] [--rounds 2] [--clients 8] [--samples 16] [--only a,c,d] [--json FILE]

(a) is the published reference code's pattern, (b) that of Flower's LLM example, (c) a bare PyTorch loop, (d) fedmllm one client
at a time, (e) fedmllm in cohorts. `contenders/` has a file for each, which says what was kept of its original. Every contender
runs in a process of its own, in turn, `--repeats` times; ratios are taken within a repeat, and their median and range over
the repeats printed. Seconds mean nothing on a shared machine and are in the JSON only. The exit status is 1 where the
contenders did not reach the same model: ratios of different work are worth nothing.

Training is the rounds alone: imports, the first load of the model and the start of Ray do not count, (b)'s load of the model in
every call does. What (d) and (e) encode once before the first round is counted in rows of its own. Evaluation asks
the same questions: (a) and (b) generate every answer, (d) and (e) score the closed questions and generate the open ones.

Each contender may use `--threads` threads, two by default; (b) gives each to a client of its own, which is fastest for it.
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
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from transformers.utils import logging

from contenders import CONTENDERS
from contenders.making import make
from contenders.workload import Outcome, Size, Tensors, Workload

LOSS_TOLERANCE = 1e-3
ADAPTER_TOLERANCE = 1e-2
PACKAGES = ("fedmllm", "torch", "transformers", "peft", "accelerate", "flwr", "ray")
Repeat = dict[str, Outcome]


def missing(letter: str) -> str | None:
    """Why this contender cannot run here, as a sentence; None where it can."""
    if letter == "b" and not (find_spec("flwr") and find_spec("ray")):
        return 'Flower with Ray is not installed: python -m pip install -c requirements/constraints.txt -e ".[bench]"'
    return None


def run_one(letter: str, workload: Path, out: Path, threads: int) -> Outcome:
    """One contender in a new process. Leaves with its last words where it failed."""
    out.mkdir()
    quiet = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
        "FEDMLLM_CACHE": str(out / "cache"),  # its vision features are its own work
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(out / "flwr"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "contenders", letter, str(workload), str(out)]
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"({letter}) failed:\n{done.stderr[-3000:]}")
    return Outcome.load(out)


# Whether all did the same work


def distance(a: Tensors, b: Tensors) -> float:
    """The Euclidean norm of a − b."""
    assert a.keys() == b.keys(), "adapters have other tensors"
    return math.sqrt(sum(float((a[name] - b[name]).double().pow(2).sum()) for name in a))


def disagreement(one: Outcome, other: Outcome, initial: Tensors) -> tuple[float, float]:
    """(largest relative difference of a round's loss, distance of the adapters as a share of what training moved them)."""
    losses = max(abs(x - y) / abs(y) for x, y in zip(one.losses, other.losses, strict=True))
    return losses, distance(one.adapter, other.adapter) / distance(other.adapter, initial)


def check(repeats: Sequence[Repeat], initial: Tensors) -> bool:
    """Whether every contender reached the first one's losses and adapter; prints by how much they differ."""
    first = next(iter(repeats[0]))
    agree = True
    for letter in list(repeats[0])[1:]:
        pairs = [disagreement(repeat[letter], repeat[first], initial) for repeat in repeats]
        loss, moved = max(p[0] for p in pairs), max(p[1] for p in pairs)
        fine = loss < LOSS_TOLERANCE and moved < ADAPTER_TOLERANCE
        agree &= fine
        says = "same work" if fine else "NOT the same work"
        print(f"  ({letter}) and ({first}): losses differ by {loss:.1e}, adapters by {moved:.1e} of the way trained: {says}")
    return agree


# Ratios


def training(o: Outcome) -> float:
    return o.train_seconds


def evaluation(o: Outcome) -> float:
    return o.eval_seconds or math.nan


def prepared(o: Outcome) -> float:
    return o.train_seconds + o.prepare_seconds


Seconds = Callable[[Outcome], float]
PAIRS: list[tuple[str, str, str, Seconds]] = [
    ("training", "a", "d", training),
    ("training", "b", "d", training),
    ("training", "d", "c", training),
    ("training", "a", "e", training),
    ("training", "b", "e", training),
    ("training", "d", "e", training),
    ("training and what is encoded before it", "a", "d", prepared),
    ("training and what is encoded before it", "b", "d", prepared),
    ("training and what is encoded before it", "a", "e", prepared),
    ("training and what is encoded before it", "b", "e", prepared),
    ("evaluation: generated one by one / scored", "a", "d", evaluation),
    ("evaluation: generated in batches / scored", "b", "d", evaluation),
]


def paired(repeats: Sequence[Repeat], over: str, under: str, seconds: Seconds) -> list[float]:
    """The ratio in each repeat."""
    return [seconds(repeat[over]) / seconds(repeat[under]) for repeat in repeats]


def spread(ratios: Sequence[float]) -> str:
    """Median and range, 21 wide."""
    if math.isnan(ratios[0]):
        return f"{'–':>6}{'':15}"
    return f"{statistics.median(ratios):6.2f} × " + f"({min(ratios):.2f}–{max(ratios):.2f})".ljust(12)


def table(repeats: Sequence[Repeat]) -> None:
    letters = list(repeats[0])
    base = "d" if "d" in letters else letters[0]
    columns = (f"training / ({base})", f"evaluation / ({base})", "memory", "accuracy")
    print(f"\n{'':68}{columns[0]:23}{columns[1]:23}{columns[2]:>8}{columns[3]:>10}")
    for letter in letters:
        outcomes = [repeat[letter] for repeat in repeats]
        train, examine = (paired(repeats, letter, base, seconds) for seconds in (training, evaluation))
        memory = statistics.median(o.peak_memory_mb for o in outcomes)
        accuracy = outcomes[0].accuracy
        scored = "–" if accuracy is None else f"{100 * accuracy:.1f} %"
        print(f"({letter}) {CONTENDERS[letter].what:64}{spread(train)}  {spread(examine)}  {memory:5.0f} MB{scored:>10}")
    print()
    for name, over, under, seconds in PAIRS:
        if over in letters and under in letters:
            print(f"  ({over})/({under})  {name:42}{spread(paired(repeats, over, under, seconds))}")
    if "b" in letters:
        starts = [repeat["b"].startup_seconds / repeat["b"].train_seconds for repeat in repeats]
        print(f"  (b)      {'start of Ray (not counted) / training':42}{spread(starts)}")


def report(workload: Workload, repeats: Sequence[Repeat], left_out: dict[str, str]) -> dict[str, object]:
    """Everything, for `--json`."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    first, letters = next(iter(repeats[0])), repeats[0].keys()
    outcomes = [{k: {n: v for n, v in vars(o).items() if n != "adapter"} for k, o in repeat.items()} for repeat in repeats]
    ratios = [
        {"what": name, "over": over, "under": under, "ratios": paired(repeats, over, under, seconds)}
        for name, over, under, seconds in PAIRS
        if {over, under} <= letters
    ]
    differ = [
        {k: disagreement(o, repeat[first], workload.initial) for k, o in repeat.items() if k != first} for repeat in repeats
    ]
    return {
        "size": vars(workload.size), "versions": versions, "platform": platform.platform(), "cores": os.cpu_count(),
        "left_out": left_out, "repeats": outcomes, "ratios": ratios, "disagreement": differ,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="fedmllm and its peers on the same work, as ratios of seconds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8, help="all take part in every round")
    parser.add_argument("--samples", type=int, default=16, help="of each client, a multiple of 4")
    parser.add_argument("--questions", type=int, default=192, help="to evaluate on")
    parser.add_argument("--cohort", type=int, help="clients that (e) trains in one pass; by default its own choice")
    parser.add_argument("--threads", type=int, default=2, help="that a contender may use; (b) has as many clients at a time")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders to run, such as a,c,d")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - CONTENDERS.keys():
        parser.error(f"--only: {min(unknown)!r} is none of {', '.join(CONTENDERS)}")
    if options.samples % 4:
        parser.error("--samples: must be a multiple of 4, so that every step has as many")
    logging.disable_progress_bar()
    left_out = {letter: why for letter in wanted if (why := missing(letter))}
    letters = [letter for letter in CONTENDERS if letter in wanted and letter not in left_out]
    for letter, why in left_out.items():
        print(f"({letter}) {CONTENDERS[letter].what} is left out: {why}.")
    size = Size(options.rounds, options.clients, options.samples, options.questions, options.cohort or "auto")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        workload = make(size)
        workload.save(folder)
        repeats: list[Repeat] = []
        for number in range(options.repeats):
            repeats.append({})
            for letter in letters:
                print(f"repeat {number + 1} of {options.repeats}: ({letter})", file=sys.stderr)
                repeats[-1][letter] = run_one(letter, folder, folder / f"{letter}-{number}", options.threads)
    steps = size.rounds * size.clients * size.samples // 4
    print(f"\n{size.rounds} rounds of {size.clients} clients, {steps} steps of 4 samples")
    print(f"{len(repeats)} repeats, threads: {options.threads}")
    if "e" in letters:
        print(f"(e) trains {repeats[0]['e'].cohort} clients in one pass")
    print()
    agree = check(repeats, workload.initial)
    table(repeats)
    if options.json:
        options.json.write_text(json.dumps(report(workload, repeats, left_out), indent=2) + "\n")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
