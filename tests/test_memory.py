"""What clients remember, on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmllm.fleets.memory import ClientMemory
from fedmllm.tensors import State
from helpers import same, tensors


def holding(value: float) -> State:
    return {"control": tensors(x=value)}


@pytest.fixture
def memory(tmp_path: Path) -> ClientMemory:
    return ClientMemory(tmp_path / "clients")


def test_a_client_is_given_what_it_remembered_before_the_round(memory: ClientMemory) -> None:
    assert memory.load(3, 0) == {}
    memory.save(3, 0, holding(1))
    memory.save(3, 4, holding(2))
    assert memory.load(3, 0) == {}, "a round that is done again starts from before itself"
    assert same(memory.load(3, 1), holding(1))
    assert same(memory.load(3, 4), holding(1))
    assert same(memory.load(3, 5), holding(2))
    assert memory.load(33, 5) == {}


def test_only_the_latest_is_kept_once_the_server_is_past_it(memory: ClientMemory, tmp_path: Path) -> None:
    for number, value in ((0, 1), (2, 2), (5, 3)):
        memory.save(1, number, holding(value))
    memory.commit(2, [1])
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.safetensors")) == [
        "clients/client-1/round-2.safetensors", "clients/client-1/round-5.safetensors"
    ]  # fmt: skip
    assert same(memory.load(1, 5), holding(2))


def test_forgetting_a_round_goes_back_to_before_it(memory: ClientMemory) -> None:
    memory.save(1, 0, holding(1))
    memory.save(1, 2, holding(2))
    memory.forget(2, [1, 7])
    assert same(memory.load(1, 3), holding(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_remembered(memory: ClientMemory, bad: float) -> None:
    memory.save(1, 0, holding(1))
    memory.save(1, 1, holding(bad))
    assert same(memory.load(1, 2), holding(1))


def test_nothing_is_written_for_those_who_remember_nothing(memory: ClientMemory, tmp_path: Path) -> None:
    memory.save(1, 0, {})
    memory.save(1, 1, {"control": {}})
    assert not (tmp_path / "clients").exists()


def test_a_clients_files_are_found_without_looking_at_those_of_others(
    memory: ClientMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round costs the same however many clients have been there: as many directory entries are read."""
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
            memory.save(client, number, holding(number))
        memory.forget(number, clients[:1])
        memory.commit(number, clients)
        return len(read)

    a_round(0, [0, 1])
    few = a_round(1, [0, 1])
    for client in range(2, 300):
        memory.save(client, 1, holding(1))
    assert a_round(2, [0, 1]) == few > 0
