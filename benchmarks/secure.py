"""What secure aggregation costs: seconds at a client and at the server, bytes, and whole rounds with and without it.

    python benchmarks/secure.py [experiments/quickstart.toml] [--rounds 3] [--numbers 1000000] [--json FILE]

The first part needs no model: clients have updates of random numbers, first without drop-outs, then with one in ten clients
lost after it shared its secrets. Seconds are processor time, which does not depend on other processes; those of all clients
are divided by their number, because each has a machine of its own. For comparison, the server computes the mean of the same
updates without masks. The second part runs the experiment with three clients per round, with and without secure aggregation.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from fedmllm.algorithms import RoundInfo, Update, algorithms
from fedmllm.config import read, validate
from fedmllm.experiment.parts import build
from fedmllm.runs.rounds import begin, federation_plan, prepare_run, train_rounds
from fedmllm.runs.session import Session
from fedmllm.secure.clients import SecureClients
from fedmllm.secure.fleet import SecureFleet
from fedmllm.secure.settings import Pairwise, Phase, secures
from fedmllm.tensors import State, Tensors, distance
from harness import TimedRunDir, experiment_parser

SIZES = ((3, 0), (10, 0), (33, 0), (100, 32))
"""(clients in a round, neighbours of each; 0 for all)"""


class FakeClients:
    """Clients with given updates; `seconds` is the total time of their side of the protocol."""

    def __init__(self, settings: Pairwise, updates: Mapping[int, Update], gone: Sequence[int]) -> None:
        self._clients, self._updates, self._gone = SecureClients(settings, algorithms.build("fedavg", {})), updates, gone
        self.seconds = 0.0

    def request(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        began = time.process_time()
        answers: list[Update] = []
        for client, message in messages.items():  # one at a time, because no client stores the vectors of others
            if not (client in self._gone and phase in ("masked", "unmask")):
                answers += self._clients.answer(phase, "bench", info, {client: message}, self._train)
        self.seconds += time.process_time() - began
        return answers

    def _train(self, messages: Mapping[int, State]) -> Sequence[Update]:
        return [self._updates[client] for client in messages]

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        return list(self._updates.values())

    def forget(self, round: int, clients: Sequence[int]) -> None: ...

    def commit(self, round: int) -> None: ...

    def personal(self, client: int, message: State, done: int) -> Tensors:
        raise NotImplementedError


def protocol(numbers: int, clients: int, neighbours: int, gone: int) -> dict[str, float]:
    """Seconds of a client and of the server, and the bytes that a client sends and receives beyond those of an open round."""
    settings, algorithm = secures.build("pairwise", {"neighbours": neighbours}), algorithms.build("fedavg", {})
    assert settings is not None
    message: State = {"adapter": {"w": torch.zeros(numbers)}}
    updates = {c: Update(c, {"adapter": {"w": 0.01 * torch.randn(numbers)}}, 100 + c, 5) for c in range(clients)}
    fake = FakeClients(settings, updates, range(gone))
    fleet = SecureFleet(settings, algorithm, fake, fake, "bench")
    info = RoundInfo(0, 1, clients, tuple(range(clients)), 0)
    began = time.process_time()
    received = fleet.train(info, dict.fromkeys(info.sampled, message))
    total = time.process_time() - began
    good = [u for u in received if not u.problem]
    began = time.process_time()
    plain = algorithm.aggregate(message, [updates[u.client] for u in good], info)
    seconds = time.process_time() - began
    error = distance(algorithm.aggregate(message, good, info)["adapter"], plain["adapter"]) / numbers**0.5
    assert error < 1e-5
    last = received[-1].travelled
    assert last is not None
    down, up = (sum(counts.values()) - 4 * numbers for counts in last)
    return {
        "client": fake.seconds / clients, "server": total - fake.seconds, "plain": seconds, "off": error,
        "bytes_up": up, "bytes_down": down,
    }  # fmt: skip


def rounds(file: Path, count: int, secure: str) -> list[float]:
    """Seconds of each round except the first."""
    raw: dict[str, Any] = read(file) | {"secure": {"name": secure}}
    raw["train"] = raw.get("train", {}) | {"rounds": count + 1, "clients_per_round": 3}
    parts = build(validate(raw))
    session = Session(parts, parts.prepare())
    with tempfile.TemporaryDirectory() as folder:
        directory = TimedRunDir(Path(folder) / "run")
        run = prepare_run("federated", session, directory)
        with directory.claimed():
            begin(run)
            train_rounds(run, parts.algorithm, session.clients, federation_plan(session), "rounds")
        return [after.cpu - before.cpu for before, after in pairwise(directory.ends)]


def main() -> None:
    parser = experiment_parser("Measure what secure aggregation costs.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--numbers", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable_progress_bar()
    results: dict[str, Any] = {"protocol": [], "rounds": {}}
    print(
        f"{options.numbers:,} numbers; seconds of one client, the server, an open mean; bytes of a client beyond 4 per number"
    )
    for clients, neighbours in SIZES:
        for gone in sorted({0, clients // 10}):
            row = protocol(options.numbers, clients, neighbours, gone)
            results["protocol"].append({"clients": clients, "neighbours": neighbours, "gone": gone} | row)
            label = f"{clients} clients, {neighbours or 'all'} neighbours, {gone} gone"
            cost = f"{row['client']:8.3f} s{row['server']:9.3f} s{row['plain']:9.3f} s"
            print(f"{label:36}{cost}  up {row['bytes_up']:+,.0f}  down {row['bytes_down']:+,.0f}  off by {row['off']:.1e}")
    for name in ("none", "pairwise", "none", "pairwise"):
        results["rounds"].setdefault(name, []).extend(rounds(options.file, options.rounds, name))
    plain, hidden = (statistics.median(results["rounds"][name]) for name in ("none", "pairwise"))
    print(f"{options.file.stem}, 3 clients per round: {plain:.2f} s plain, {hidden:.2f} s secure, ratio {hidden / plain:.3f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
