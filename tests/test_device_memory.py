"""Clients whose devices have less memory than training takes, which take no part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from commands import call, run
from fedmllm.config import LoraTable, ModelTable, TrainTable, validate
from fedmllm.data.files import EntryError
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.prompts import Conversation
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build
from fedmllm.federation import RoundRecord, federate, participants
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.outline import config_of, frozen_bytes, outline
from fedmllm.runs.memory import check_enough, longest, memory_of, who_lacks
from fedmllm.runs.rounds import federation_plan
from fedmllm.runs.session import Session
from fedmllm.simulation.clock import Simulation
from fedmllm.simulation.devices import Device
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State
from fedmllm.training.capacity import pass_bytes, training_bytes
from helpers import ADAPTER_INFO, FakeFleet, built, lora_adapter, same

FILE: dict[str, Any] = {
    "task": {"name": "shapes-qa"},
    "partition": {"clients": 8},
    "clients": {"speed": [2.0, 5.0, 3.0]},
    "train": {"clients_per_round": 3, "rounds": 40},
}
EXCLUDED = frozenset({0, 3, 7})


def merged(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return FILE | {name: FILE.get(name, {}) | table for name, table in tables.items()}


# Who lacks memory


@pytest.mark.parametrize(
    ("table", "lacking", "takes"),
    [
        ({}, set(), ""),
        ({"speed": [1.0]}, set(), ""),
        ({"memory": [4.0]}, set(), ""),  # exactly enough
        ({"memory": [4.0, 3.999]}, {1, 3, 5, 7}, "4 GB at a batch of 4"),
        ({"memory": [1e-9]}, set(range(8)), "4 GB at a batch of 4"),
        ({"memory": [4.0, 8.0, 4.0], "batch_size": [8, 2]}, {0, 2, 6}, "8 GB at a batch of 8"),
        ({"memory": [1.5], "batch_size": [1, 2, 8]}, {1, 2, 4, 5, 7}, "2 GB at a batch of 2 and 8 GB at a batch of 8"),
        ({"profile": ["phone", "laptop"], "batch_size": [8]}, {0, 2, 4, 6}, "8 GB at a batch of 8"),
        ({"profile": ["phone", "laptop"], "batch_size": [8], "memory": [8.0]}, set(), ""),
    ],
)  # fmt: skip
def test_whose_device_is_too_small_for_its_batches(table: dict[str, Any], lacking: set[int], takes: str) -> None:
    config = validate({**FILE, "clients": table})
    assert who_lacks(config, memory_of(config), lambda batch_size: batch_size * 10**9) == (lacking, takes)


def test_nothing_is_limited_without_figures() -> None:
    assert memory_of(validate({**FILE, "clients": {"speed": [1.0]}})) == {}
    assert memory_of(validate({**FILE, "clients": {"memory": [0.5, 2.0]}})) == {k: (0.5, 2.0)[k % 2] * 1e9 for k in range(8)}


@pytest.mark.parametrize(
    ("tables", "lacking", "message"),
    [
        ({}, 6, "train.clients_per_round = 3, and 2 of 8 clients have the memory that training takes, 2 GB at a"),
        ({}, 8, "train.clients_per_round = 3, and 0 of 8 clients have the memory that training takes"),
        (
            {"train": {"selection": "power-of-choice", "candidates": 5}},
            4,
            "train.candidates = 5, and 4 of 8 clients have the memory",
        ),
        ({"asynchronous": {"name": "fedbuff", "buffer": 6}}, 3, "asynchronous.buffer = 6, and 5 of 8 clients have the memory"),
        (
            {"privacy": {"name": "user-level", "noise": 1.0, "delta": 0.01}},
            1,
            "clients.memory: training takes 2 GB at a batch of 4, for which 1 of 8 devices are too small, and privacy.name = "
            "'user-level' needs a draw that depends on nobody; raise clients.memory.",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_if_clients_lack_memory(tables: dict[str, Any], lacking: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_enough(build(validate(merged(tables))), frozenset(range(lacking)), "2 GB at a batch of 4")
    assert message in str(caught.value)


def test_as_many_as_a_round_needs_are_enough() -> None:
    for tables, most in (({}, 5), ({"asynchronous": {"name": "fedbuff", "buffer": 5}}, 3)):
        check_enough(build(validate(merged(tables))), frozenset(range(most)), "2 GB at a batch of 4")


# Who is sampled

POLICIES: dict[str, dict[str, dict[str, Any]]] = {
    "uniform": {},
    "over-selection": {"train": {"over_select": 1.0}},
    "available": {"clients": {"availability": [0.3, 0.5], "speed": [1e-3]}, "train": {"selection": "available"}},
    "power-of-choice": {"train": {"selection": "power-of-choice"}},
    "all candidates": {"train": {"selection": "power-of-choice", "candidates": 8}},
    "fedasync": {"asynchronous": {"name": "fedasync"}},
    "fedbuff": {"asynchronous": {"name": "fedbuff", "buffer": 4}},
    "poisson": {"privacy": {"name": "user-level", "noise": 1.0, "delta": 0.01}},
    "robust": {"robust": {"name": "median"}},
}


def session_of(tables: Mapping[str, Mapping[str, Any]], excluded: frozenset[int]) -> Session:
    """What the plan is made from, without a model."""
    file = merged(tables)
    parts = build(validate(file | {"train": file["train"] | {"batch_size": 64}}))  # toy clients make few steps
    held = [Holding(f"s{client}-{i}", client, frozenset()) for client in range(8) for i in range(10 * (client + 1))]
    dataset = SimpleNamespace(manifest=Manifest.of(held, 8))
    model = SimpleNamespace(info=ADAPTER_INFO)
    return cast(Session, SimpleNamespace(parts=parts, config=parts.config, dataset=dataset, model=model, excluded=excluded))


def rounds_of(session: Session) -> tuple[list[RoundRecord], State]:
    fleet = FakeFleet(built("fedavg"))
    outcome = list(federate(fleet.algorithm, fleet, federation_plan(session), lora_adapter()))
    assert all(set(messages) <= set(info.sampled) for info, messages in fleet.seen)
    return [record for record, _ in outcome], outcome[-1][1]


@pytest.mark.parametrize("name", POLICIES)
def test_who_lacks_memory_is_never_sampled(name: str) -> None:
    session = session_of(POLICIES[name], EXCLUDED)
    plan = federation_plan(session)
    records, _ = rounds_of(session)
    sampled = {client for record in records for client in record.sampled}
    assert sampled == set(range(8)) - EXCLUDED == set(participants(plan))
    assert plan.info(0, (1,)).clients == 5
    everyone, _ = rounds_of(session_of(POLICIES[name], frozenset()))
    assert {client for record in everyone for client in record.sampled} == set(range(8))


@pytest.mark.parametrize("name", POLICIES)
def test_memory_that_nobody_lacks_changes_nothing(name: str) -> None:
    tables = POLICIES[name]
    clients = FILE["clients"] | tables.get("clients", {})
    limited = tables | {"clients": clients | {"memory": [8.0, 4.0]}}
    records, state = rounds_of(session_of(tables, frozenset()))
    with_memory, state_with_memory = rounds_of(session_of(limited, frozenset()))
    assert same(state, state_with_memory)
    assert [(r.sampled, r.loss, r.clock) for r in records] == [(r.sampled, r.loss, r.clock) for r in with_memory]


def test_a_round_waits_for_clients_that_take_part() -> None:
    devices = [Device(availability=0.05)] * 8
    clock = Simulation(0, devices, [1] * 8, waits=True, excluded=sorted(EXCLUDED))
    free = Simulation(0, devices, [1] * 8, waits=True)
    later = 0
    for now in np.linspace(1.0, 200_000.0, 60):
        state = {"clock": {"seconds": torch.tensor([now], dtype=torch.float64)}}
        begins = clock.begins(state)
        reached = np.flatnonzero(clock.reachable(begins))
        assert len(reached)
        assert not EXCLUDED.intersection(reached.tolist())
        later += begins > free.begins(state)
    assert later


# What training takes


@pytest.fixture(scope="module")
def model(tiny: Path) -> MLLM:
    return MLLM.load(ModelTable(name=str(tiny), lora=LoraTable(rank=2, alpha=4.0), precision="fp32"), seed=0)


def kept_by(model: MLLM, batch: list[Encoded]) -> int:
    """Bytes that autograd keeps of a batch, each storage once, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.losses(batch).sum()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)


def test_the_estimate_covers_weights_and_what_a_batch_keeps(model: MLLM, dataset: Path) -> None:
    talks = [Conversation("name the color. " * repeats, "red", image=repeats % 2 > 0) for repeats in (1, 2, 3, 4, 5)]
    samples = model.encode(talks, [dataset / "red.png"] * len(talks), 300)
    model.fused = False  # whose own copies of the weights are not among what is kept
    longest = max(samples, key=lambda sample: sample.length)
    kept, _ = pass_bytes(model, [longest], TrainTable())
    outlined = outline(model.settings, config_of(model.settings), torch.float32)
    assert pass_bytes(outlined, [longest], TrainTable())[0] == pytest.approx(kept, rel=0.2)
    assert frozen_bytes(outlined) == frozen_bytes(model)
    adapter = sum(p.nbytes for p in model.adapter.parameters.values())
    weights = frozen_bytes(model)
    sizes = [training_bytes(model, kept, TrainTable(batch_size=batch_size)) for batch_size in range(1, 9)]
    assert sizes == sorted(set(sizes)), "more with larger batches"
    assert np.diff(sizes).tolist() == [kept] * 7
    assert sizes[0] == weights + 8 * adapter + kept
    for number in (1, 2, 5):
        assert sizes[number - 1] >= weights + adapter + kept_by(model, [samples[4]] * number)
    for batch in (
        samples[:2],
        samples[1:4],
        samples,
    ):  # samples of unequal length have a mask of padding, which is not measured
        assert 1.2 * sizes[len(batch) - 1] >= weights + adapter + kept_by(model, batch)


def test_the_sample_with_the_most_text_is_measured_with_and_without_a_picture() -> None:
    words = {"a": 3, "b": 9, "c": 5, "d": 8, "e": 9}
    pictured = {"c", "d"}
    held = [Holding(name, 0, frozenset()) for name in words]
    tried = []

    def encode(holding: Holding) -> Encoded:
        tried.append(holding.sample_id)
        if holding.sample_id == "d":
            raise EntryError("the processor refuses it", "bad picture")
        return Encoded((1,) * words[holding.sample_id], (), (), (), {}, {})

    def talk(holding: Holding) -> Conversation:
        return Conversation("x" * words[holding.sample_id], "", image=holding.sample_id in pictured)

    assert [sample.length for sample in longest(held, talk, encode)] == [9, 5]
    assert tried == ["b", "d", "c"]
    assert list(longest([], talk, encode)) == []


# A run


def test_a_run_leaves_out_who_lacks_memory(write_experiment: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--set", 'eval.patterns=["text"]', "--set", "clients.speed=[1.0]", "--set", "clients.memory=[1.0, 1e-4]"]
    done = call("run", write_experiment(rounds=2), *options, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    note = "2 of 4 clients do not take part: training takes 0.00"
    assert done.stderr.count(note) == 1
    assert "GB at a batch of 4, and their devices have less (clients.memory)" in done.stderr
    rows = RunDir(tmp_path / "run").result()["per_client"]
    assert [row.get("eligible") for row in rows] == [None, False, None, False]
    assert [row["rounds"] for row in rows] == [2, 0, 2, 0]


def test_a_run_in_which_nobody_lacks_memory_is_as_without(write_experiment: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--set", 'eval.patterns=["text"]', "--set", "clients.speed=[1.0]"]
    free, limited = (
        run(
            "run",
            write_experiment(rounds=1),
            *options,
            "--set",
            f"clients.memory={memory}",
            "--out",
            tmp_path / str(len(memory)),
        )
        for memory in ("[]", "[1.0]")
    )
    for key in ("adapter_sha256", "metrics", "per_client", "bytes_down", "cohort", "simulated_seconds", "skipped_samples"):
        assert free[key] == limited[key]
