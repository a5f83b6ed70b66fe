"""Three hundred rounds: memory, open files and the files of the run stay as they are after the first of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import median

import pytest
import torch

from fedmllm import api
from fedmllm.algorithms import Update
from fedmllm.algorithms.base import Algorithm, RoundInfo
from fedmllm.algorithms.toy_federation import lora_adapter, train_clients
from fedmllm.federation import FederationPlan, federate
from fedmllm.fleets.memory import ClientMemory
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State, Tensors
from helpers import built

ROUNDS = 300
MEGABYTE = 2**20
ADAPTER = lora_adapter(layers=2, rank=2_000)
"""0.1 MB."""


def resident() -> int:
    """The memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Gauge:
    """Memory and open files after each of so many rounds; after a third and after all of them, the number of objects and the
    bytes of all tensors, which count what is kept even where a process that has freed memory before needs no more of it."""

    def __init__(self, rounds: int = ROUNDS) -> None:
        self.settled, self.last = rounds // 3, rounds - 1
        self.memory: list[int] = []
        self.objects: list[int] = []
        self.tensors: list[int] = []
        self.files: list[int] = []

    def read(self) -> None:
        self.memory.append(resident())
        self.files.append(sum(1 for _ in Path("/proc/self/fd").iterdir()))
        if len(self.memory) in (self.settled, self.last):
            gc.collect()
            objects = gc.get_objects()
            self.objects.append(len(objects))
            self.tensors.append(sum(thing.nbytes for thing in objects if issubclass(type(thing), torch.Tensor)))

    def growth(self) -> dict[str, float]:
        """By how much each is more at the end than when everything had been done several times."""
        early, late = slice(self.settled, self.settled + 10), slice(-10, None)
        return {
            "megabytes": (median(self.memory[late]) - median(self.memory[early])) / MEGABYTE,
            "objects": self.objects[1] - self.objects[0],
            "tensors": (self.tensors[1] - self.tensors[0]) / MEGABYTE,
            "files": median(self.files[late]) - median(self.files[early]),
        }


class DiskFleet:
    """Toy clients that remember on disk, as those of a run do. If `leaks`, it keeps a copy of every message."""

    def __init__(self, algorithm: Algorithm, folder: Path, leaks: bool) -> None:
        self._algorithm, self._memory, self._leaks = algorithm, ClientMemory(folder), leaks
        self._kept: list[Mapping[int, State]] = []

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        memories = {client: self._memory.load(client, info.round) for client in messages}
        updates = train_clients(self._algorithm, messages, memories, info, ADAPTER)
        for client, state in memories.items():
            self._memory.save(client, info.round, state)
        self._kept += [deepcopy(dict(messages))] if self._leaks else []
        return updates

    def commit(self, round: int) -> None:
        self._memory.commit(round, range(4))

    def forget(self, round: int, clients: Sequence[int]) -> None:
        self._memory.forget(round, clients)

    def personal(self, client: int, message: State, done: int) -> Tensors:
        raise NotImplementedError


def soak(folder: Path, rounds: int, leaks: bool) -> tuple[Gauge, list[int]]:
    """A federation with checkpoints, and the number of its files after each round."""
    algorithm, run, gauge, files = built("scaffold"), RunDir(folder), Gauge(rounds), list[int]()
    run.begin('name = "x"\n', {})
    fleet = DiskFleet(algorithm, run.checkpoint / "clients", leaks)
    plan = FederationPlan(range(4), 2, rounds, 0.1, "constant", 1, 0)
    for record, state in federate(algorithm, fleet, plan, ADAPTER):
        run.save_round(vars(record), state, "d")
        assert run.rounds()[-1]["round"] == record.round  # which waits until the checkpoint is written
        gauge.read()
        files.append(sum(len(names) for _, _, names in os.walk(folder)))
    assert len(files) == len(run.rounds()) == rounds
    return gauge, files


def test_three_hundred_rounds_leave_nothing_behind(tmp_path: Path) -> None:
    gauge, files = soak(tmp_path, ROUNDS, leaks=False)
    growth = gauge.growth()
    assert growth["megabytes"] < 8
    assert growth["objects"] < 100
    assert growth["tensors"] == 0
    assert growth["files"] == 0
    assert max(files) <= 16, "of each of 4 clients at most 3 states, and 4 files of the run"


def test_what_stays_behind_is_noticed(tmp_path: Path) -> None:
    growth = soak(tmp_path, 75, leaks=True)[0].growth()
    assert growth["tensors"] > 5, "in 50 rounds"
    assert growth["objects"] > 100


@pytest.mark.slow
def test_three_hundred_rounds_of_a_model(write_experiment: Callable[..., Path], tmp_path: Path) -> None:
    gauge = Gauge()

    def after(stage: str, done: int, total: int, note: str) -> None:
        if total == ROUNDS:
            gauge.read()

    result = api.run(api.load(write_experiment(rounds=ROUNDS)), out=tmp_path / "run", progress=after)
    assert result.json["rounds"] == ROUNDS <= len(gauge.memory)
    growth = gauge.growth()
    assert growth["megabytes"] < 16
    assert growth["tensors"] < 1
    assert growth["objects"] < 2_000, "a few for each record of a round, which the result counts"
    assert growth["files"] <= 1, "a checkpoint that is being written"
