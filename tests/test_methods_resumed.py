"""Every algorithm and wrapper in a run that is stopped and resumed, and what its clients remember, on the tiny model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import call, run, settings
from fedmllm.algorithms import LocalResult, algorithms
from fedmllm.fleets import inprocess
from fedmllm.fleets.base import FleetBackend
from fedmllm.fleets.memory import ClientMemory
from fedmllm.storage.run_dir import RunDir
from fedmllm.storage.state_file import load_state
from fedmllm.tensors import State
from fedmllm.training.cohort import train_cohort

Write = Callable[..., Path]
Whole = Callable[[dict[str, str], list[object]], tuple[dict[str, Any], Path]]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


COMPOSED = [
    {"algorithm__name": "scaffold", "regularization__name": "adaptive", "compression__name": "top-k"},
    {"algorithm__name": "flora", "clients__rank": "[1, 2]", "compression__name": "int8"},
    {"algorithm__name": "feddyn", "model__adapter__kind": "dora", "regularization__name": "fedprox"},
    {"algorithm__name": "fedsa-lora", "compression__name": "top-k"},
    {"algorithm__name": "fedilora", "clients__rank": "[1, 2, 2]", "regularization__name": "adaptive"},
    {"algorithm__name": "fedadam", "model__adapter__kind": "prompt-tuning"},
    {"algorithm__name": "scaffold", "model__adapter__kind": "lora-xs", "compression__name": "int8"},
]


NEEDED = {"modality-aware": {"model__lora__target": r".*\.q_proj"}, "fed-sb": {"model__adapter__kind": "lora-xs"}}
"""What an algorithm needs besides its name: `modality-aware` adapts the vision tower."""

# Three of four clients a round: some come back, and what they remember is read again.
BUSY = {"train__clients_per_round": 3}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The result of a run, and a copy of its folder from right after the checkpoint of its first round: what a process that is
    killed there leaves. It is executed once for all tests of the same parts."""
    results: dict[str, tuple[dict[str, Any], Path]] = {}

    def result(parts: dict[str, str], command: list[object]) -> tuple[dict[str, Any], Path]:
        key = json.dumps(parts, sort_keys=True)
        if key not in results:
            cut, save = tmp_path_factory.mktemp("first-round") / "cut", RunDir.save_round

            def save_and_copy(self: RunDir, record: Mapping[str, Any], state: State, digest: str) -> None:
                save(self, record, state, digest)
                if record["round"] == 0:
                    self.rounds()  # once it is written
                    shutil.copytree(self.path, cut)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(RunDir, "save_round", save_and_copy)
                results[key] = run(*command), cut
        return results[key]

    return result


@pytest.mark.parametrize(
    "parts",
    [*({"algorithm__name": name, **NEEDED.get(name, {})} for name in algorithms.names()), *COMPOSED],
    ids=lambda parts: "-".join(parts.values()).replace(" ", ""),
)
def test_cut_short_and_resumed_equals_uninterrupted(
    write_experiment: Write, uninterrupted: Whole, parts: dict[str, str]
) -> None:
    command = ["run", write_experiment(rounds=2), *settings(**parts, **BUSY)]
    whole, cut = uninterrupted(parts, command)
    assert len(RunDir(cut).rounds()) == 1
    assert not RunDir(cut).complete
    resumed = run(*command, "--out", cut, "--resume")
    for key in ("adapter_sha256", "metrics", "per_client", "bytes_up", "bytes_down", "rounds"):
        assert resumed[key] == whole[key], key
    assert whole["refused_updates"] == 0
    assert sum(whole["bytes_up"].values()) > 0
    sampled = [set(record["sampled"]) for record in RunDir(cut).rounds()]
    assert sampled[0] & sampled[1]


REMEMBERING = [
    {"algorithm__name": "scaffold"},
    {"algorithm__name": "feddyn"},
    {"algorithm__name": "fedsa-lora"},
    {"algorithm__name": "ditto"},
    {"algorithm__name": "fedavg", "compression__name": "top-k"},
]


@pytest.mark.parametrize("parts", REMEMBERING, ids=lambda parts: "-".join(parts.values()))
def test_what_clients_remember_matters(
    write_experiment: Write, uninterrupted: Whole, monkeypatch: pytest.MonkeyPatch, parts: dict[str, str]
) -> None:
    """Forgetting it changes the result, so that the tests above would notice a memory that is lost."""
    command = ["run", write_experiment(rounds=2), *settings(**parts, **BUSY)]
    whole, _ = uninterrupted(parts, command)
    monkeypatch.setattr(ClientMemory, "load", lambda *arguments: {})
    assert run(*command)["adapter_sha256"] != whole["adapter_sha256"]


@pytest.mark.parametrize("parts", REMEMBERING, ids=lambda parts: "-".join(parts.values()))
def test_stopped_within_a_round_and_resumed_equals_uninterrupted(
    write_experiment: Write, uninterrupted: Whole, monkeypatch: pytest.MonkeyPatch, parts: dict[str, str]
) -> None:
    """Some clients of round 1 have saved their memory, the server has not: the round is done again from before it."""
    command = ["run", write_experiment(rounds=2), *settings(**parts, **BUSY)]
    whole, _ = uninterrupted(parts, command)
    save, saved = ClientMemory.save, []

    def save_then_fail(self: ClientMemory, client: int, round: int, state: State) -> None:
        save(self, client, round, state)
        saved.append((client, round))
        if [r for _, r in saved].count(1) == 2:
            raise OSError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(ClientMemory, "save", save_then_fail)
        assert call(*command, "--out", "cut").exit_code == 1
    assert len(RunDir(Path("cut")).rounds()) == 1
    assert run(*command, "--out", "cut", "--resume")["adapter_sha256"] == whole["adapter_sha256"]


@pytest.mark.parametrize("parts", REMEMBERING, ids=lambda parts: "-".join(parts.values()))
def test_a_client_that_was_refused_once_is_welcome_the_next_time(
    write_experiment: Write, monkeypatch: pytest.MonkeyPatch, parts: dict[str, str]
) -> None:
    """Its first training ends in NaN: that round's memory goes with the update."""
    spoilt = []

    def train_badly_once(*arguments: Any) -> list[LocalResult]:
        first, *others = train_cohort(*arguments)
        if spoilt:
            return [first, *others]
        spoilt.append(True)
        nan = {name: torch.full_like(t, math.nan) for name, t in first.trained.items()}
        return [replace(first, trained=nan, mean_gradient=nan if first.mean_gradient is not None else None), *others]

    backend = FleetBackend(lambda context: inprocess.InProcessFleet(context, train_badly_once))
    monkeypatch.setattr(inprocess, "IN_PROCESS", backend)
    result = run("run", write_experiment(rounds=2), *settings(**parts, train__clients_per_round=4), "--out", "a")
    records = RunDir(Path("a")).rounds()
    (refused,) = records[0]["refused"]
    assert "NaN" in refused["why"]
    assert result["refused_updates"] == 1
    assert records[1]["refused"] == []
    for path in Path("a/checkpoint/clients").rglob("*.safetensors"):
        assert not any(bool(t.isnan().any()) for tensors in load_state(path)[0].values() for t in tensors.values())
