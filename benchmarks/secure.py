"""What secure aggregation costs: seconds at a client and at the server, bytes, and whole rounds with and without it.

    python benchmarks/secure.py [experiments/quickstart.toml] [--rounds 3] [--numbers 1000000] [--json FILE]

The first table needs no model: clients with an update of so many made-up numbers, all of them there, then one of ten gone after
it shared its secrets. Seconds are the processor's, so that what else runs does not matter; those of all clients are divided by
their number, as each has a machine of its own. A plain mean is what the server makes of the same updates in the clear. The
second runs the experiment, three clients a round, and compares rounds.
"""

from __future__ import annotations

import argparse
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
from fedmllm.secure.fleet import SecureFleet
from fedmllm.secure.settings import Pairwise, Phase, secures
from fedmllm.secure.site import Parties
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State, Tensors, distance

SIZES = ((3, 0), (10, 0), (33, 0), (100, 32))
"""(clients in a round, neighbours of each; 0 for all)"""


class Pretended:
    """Clients whose updates are there; `seconds` is what their side of the protocol took, all together."""

    def __init__(self, settings: Pairwise, updates: Mapping[int, Update], gone: Sequence[int]) -> None:
        self._parties, self._updates, self._gone = Parties(settings, algorithms.build("fedavg", {})), updates, gone
        self.seconds = 0.0

    def ask(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State], lr: float) -> Sequence[Update]:
        began = time.process_time()
        answers: list[Update] = []
        for client, message in messages.items():  # one by one, as nobody holds the vectors of others
            if not (client in self._gone and phase in ("masked", "unmask")):
                one = {client: message}
                answers += self._parties.answer(phase, "bench", info, one, lambda plain: [self._updates[c] for c in plain])
        self.seconds += time.process_time() - began
        return answers

    def train(self, info: RoundInfo, messages: Mapping[int, State], lr: float) -> Sequence[Update]:
        return list(self._updates.values())

    def forget(self, round: int, clients: Sequence[int]) -> None: ...

    def commit(self, round: int) -> None: ...

    def personal(self, client: int, message: State, done: int) -> Tensors:
        raise NotImplementedError


def protocol(numbers: int, clients: int, neighbours: int, gone: int) -> dict[str, float]:
    """Seconds of a client and of the server, and bytes up and down of a client beyond what a plain round sends."""
    settings, algorithm = secures.build("pairwise", {"neighbours": neighbours}), algorithms.build("fedavg", {})
    assert settings is not None
    sent: State = {"adapter": {"w": torch.zeros(numbers)}}
    updates = {c: Update(c, {"adapter": {"w": 0.01 * torch.randn(numbers)}}, 100 + c, 5) for c in range(clients)}
    carrier = Pretended(settings, updates, range(gone))
    fleet = SecureFleet(settings, algorithm, carrier, carrier, "bench")
    info = RoundInfo(0, 1, clients, tuple(range(clients)), 0)
    began = time.process_time()
    made = fleet.train(info, dict.fromkeys(info.sampled, sent))
    whole = time.process_time() - began
    good = [u for u in made if not u.problem]
    began = time.process_time()
    plain = algorithm.aggregate(sent, [updates[u.client] for u in good], info)
    seconds = time.process_time() - began
    off = distance(algorithm.aggregate(sent, good, info)["adapter"], plain["adapter"]) / numbers**0.5
    assert off < 1e-5
    last = made[-1].travelled
    assert last is not None
    down, up = (sum(way.values()) - 4 * numbers for way in last)
    return {
        "client": carrier.seconds / clients, "server": whole - carrier.seconds, "plain": seconds, "off": off,
        "bytes_up": up, "bytes_down": down,
    }  # fmt: skip


class Watched(RunDir):
    """Notes what each round had cost when it was handed over."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.ends: list[float] = []

    def save_round(self, record: Any, state: State, config_digest: str) -> None:
        super().save_round(record, state, config_digest)
        self.ends.append(time.process_time())


def rounds(file: Path, count: int, secure: str) -> list[float]:
    """Seconds of each round but the first."""
    raw: dict[str, Any] = read(file) | {"secure": {"name": secure}}
    raw["train"] = raw.get("train", {}) | {"rounds": count + 1, "clients_per_round": 3}
    parts = build(validate(raw))
    session = Session(parts, parts.prepare())
    with tempfile.TemporaryDirectory() as folder:
        directory = Watched(Path(folder) / "run")
        run = prepare_run("federated", session, directory)
        with directory.claimed():
            begin(run)
            train_rounds(run, parts.algorithm, session.clients, federation_plan(session), "rounds")
        return [after - before for before, after in pairwise(directory.ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description="what secure aggregation costs")
    parser.add_argument("file", type=Path, nargs="?", default=Path("experiments/quickstart.toml"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--numbers", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable_progress_bar()
    found: dict[str, Any] = {"protocol": [], "rounds": {}}
    print(f"{options.numbers:,} numbers; seconds of one client, the server, a plain mean; bytes of a client beyond 4 a number")
    for clients, neighbours in SIZES:
        for gone in sorted({0, clients // 10}):
            row = protocol(options.numbers, clients, neighbours, gone)
            found["protocol"].append({"clients": clients, "neighbours": neighbours, "gone": gone} | row)
            who = f"{clients} clients, {neighbours or 'all'} neighbours, {gone} gone"
            cost = f"{row['client']:8.3f} s{row['server']:9.3f} s{row['plain']:9.3f} s"
            print(f"{who:36}{cost}  up {row['bytes_up']:+,.0f}  down {row['bytes_down']:+,.0f}  off by {row['off']:.1e}")
    for name in ("none", "pairwise", "none", "pairwise"):
        found["rounds"].setdefault(name, []).extend(rounds(options.file, options.rounds, name))
    plain, hidden = (statistics.median(found["rounds"][name]) for name in ("none", "pairwise"))
    print(f"{options.file.stem}, 3 clients a round: {plain:.2f} s plain, {hidden:.2f} s secure, ratio {hidden / plain:.3f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
