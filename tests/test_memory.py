"""The memory of clients on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmllm.fleets.memory import ClientMemory
from fedmllm.tensors import State
from helpers import same, tensors


def state(value: float) -> State:
    return {"control": tensors(x=value)}


@pytest.fixture
def memory(tmp_path: Path) -> ClientMemory:
    return ClientMemory(tmp_path / "clients")


def test_a_client_loads_its_state_from_before_the_round(memory: ClientMemory) -> None:
    assert memory.load(3, 0) == {}
    memory.save(3, 0, state(1))
    memory.save(3, 4, state(2))
    assert memory.load(3, 0) == {}, "a repeated round starts from the state before it"
    assert same(memory.load(3, 1), state(1))
    assert same(memory.load(3, 4), state(1))
    assert same(memory.load(3, 5), state(2))
    assert memory.load(33, 5) == {}


def test_a_commit_keeps_only_the_latest_state(memory: ClientMemory, tmp_path: Path) -> None:
    for number, value in ((0, 1), (2, 2), (5, 3)):
        memory.save(1, number, state(value))
    memory.commit(2, [1])
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.safetensors")) == [
        "clients/client-1/round-2.safetensors", "clients/client-1/round-5.safetensors"
    ]  # fmt: skip
    assert same(memory.load(1, 5), state(2))


def test_forgetting_a_round_restores_the_state_before_it(memory: ClientMemory) -> None:
    memory.save(1, 0, state(1))
    memory.save(1, 2, state(2))
    memory.forget(2, [1, 7])
    assert same(memory.load(1, 3), state(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_state_with_nan_or_infinity_is_not_saved(memory: ClientMemory, bad: float) -> None:
    memory.save(1, 0, state(1))
    memory.save(1, 1, state(bad))
    assert same(memory.load(1, 2), state(1))


def test_empty_states_create_no_folder(memory: ClientMemory, tmp_path: Path) -> None:
    memory.save(1, 0, {})
    memory.save(1, 1, {"control": {}})
    assert not (tmp_path / "clients").exists()


def test_finding_a_clients_files_does_not_list_those_of_others(memory: ClientMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of directory entries that a round reads does not depend on how many clients have taken part."""
    read: list[str] = []
    listdir, scandir = os.listdir, os.scandir

    def counted_listdir(path: Path) -> list[str]:
        read.extend(listdir(path))
        return listdir(path)

    def counted_scandir(path: Path) -> Iterator[os.DirEntry[str]]:
        read.extend(listdir(path))
        return scandir(path)

    monkeypatch.setattr(os, "listdir", counted_listdir)
    monkeypatch.setattr(os, "scandir", counted_scandir)

    def a_round(number: int, clients: list[int]) -> int:
        read.clear()
        for client in clients:
            memory.load(client, number)
            memory.save(client, number, state(number))
        memory.forget(number, clients[:1])
        memory.commit(number, clients)
        return len(read)

    a_round(0, [0, 1])
    few = a_round(1, [0, 1])
    for client in range(2, 300):
        memory.save(client, 1, state(1))
    assert a_round(2, [0, 1]) == few > 0


def test_a_roll_back_keeps_what_the_server_may_still_go_back_to(memory: ClientMemory, tmp_path: Path) -> None:
    for number in range(6):
        memory.save(1, number, state(number))
    memory.roll_back(1, 4)
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == [f"round-{r}.safetensors" for r in (2, 3, 4)]
    memory.roll_back(1, 2)
    assert same(memory.load(1, 6), state(2))
