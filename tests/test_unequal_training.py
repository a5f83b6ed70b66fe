"""A model in clients with epochs, batches and numbers of steps of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmllm.algorithms import Update, algorithms
from fedmllm.config import Experiment, LoraTable, ModelTable, validate
from fedmllm.data.prompts import Conversation
from fedmllm.fleets.base import FleetContext
from fedmllm.fleets.inprocess import InProcessFleet
from fedmllm.models.mllm import MLLM
from fedmllm.rng import stream
from fedmllm.tensors import State, distance
from fedmllm.training.batches import client_steps
from fedmllm.training.cohort import Work
from helpers import (
    round_info,
    same,
)
from naive_training import train_naively

FILE: dict[str, Any] = {"task": {"name": "shapes-qa"}, "partition": {"clients": 4}}


@pytest.fixture(scope="module")
def model(tiny: Path) -> MLLM:
    lora = LoraTable(rank=2, alpha=4.0)
    return MLLM.load(ModelTable(name=str(tiny), lora=lora, precision="fp32"), seed=0)


COUNTS = (9, 4, 6)
SGD = {"optimizer": "sgd", "lr": 0.1, "schedule": "constant", "batch_size": 2}


def context_of(model: MLLM, folder: Path, config: Experiment, cohort: int = 1, start: int = 3) -> FleetContext:
    talks = {
        client: [
            Conversation("name the color. " * (1 + (i * 5 + client) % 4), ("red", "blue")[i % 2], False) for i in range(count)
        ]
        for client, count in enumerate(COUNTS)
    }
    data = {client: model.encode(own, [None] * len(own), 300) for client, own in talks.items()}
    generator = torch.Generator().manual_seed(start)
    initial = {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in model.adapter.get().items()}
    gaps = dict.fromkeys(data, 0.0)
    algorithm = algorithms.build("fedavg", {})
    return FleetContext(
        model, algorithm, data, config.train, initial, gaps, folder, cohort, train_of=config.train_of
    )  # fmt: skip


def updates_of(context: FleetContext, steps: Mapping[int, int] | None = None) -> dict[int, Update]:
    info = replace(round_info(sampled=range(len(COUNTS))), lr=0.1, steps=steps or {})
    messages: dict[int, State] = {client: {"adapter": context.initial} for client in info.sampled}
    return {update.client: update for update in InProcessFleet(context).train(info, messages)}


def config_of(clients: Mapping[str, Sequence[int]] | None = None, **train: Any) -> Experiment:
    return validate({**FILE, "clients": dict(clients or {}), "train": {**SGD, **train}})


@pytest.mark.parametrize("cohort", [1, 3])
def test_equal_entries_are_the_setting_for_all(model: MLLM, tmp_path: Path, cohort: int) -> None:
    plain = updates_of(context_of(model, tmp_path, config_of(epochs=2, batch_size=3), cohort))
    listed = updates_of(context_of(model, tmp_path, config_of({"epochs": [2, 2], "batch_size": [3]}), cohort))
    allowed = updates_of(context_of(model, tmp_path, config_of(epochs=2, batch_size=3), cohort), {1: 100})
    for client, update in plain.items():
        for other in (listed[client], allowed[client]):
            assert same(update.groups, other.groups)
            assert (update.examples, update.steps, update.metrics) == (other.examples, other.steps, other.metrics)


@pytest.mark.parametrize("cohort", [1, 3])
def test_a_model_trains_as_if_it_stopped_after_the_steps(model: MLLM, tmp_path: Path, cohort: int) -> None:
    """With epochs, batches and limits of their own, against a naive loop over the first steps of each client."""
    config = config_of({"epochs": [1, 2, 3], "batch_size": [2, 1, 4]})
    context, limits = context_of(model, tmp_path, config, cohort), {0: 2, 2: 4}
    updates = updates_of(context, limits)
    whole = {0: 5, 1: 8, 2: 6}
    assert {client: update.steps for client, update in updates.items()} == {**whole, **limits}
    assert [updates[client].examples for client in range(3)] == [4, 8, 12]
    for client, update in updates.items():
        table = config.train_of(client)
        rngs = [stream(0, "batches", client, 0, epoch) for epoch in range(table.epochs)]
        steps = client_steps(context.data[client], table, rngs)
        assert len(steps) == whole[client]
        rule = context.algorithm.rule({"adapter": context.initial}, {}, round_info())
        work = Work(steps[: limits.get(client)], context.initial, rule, 0)
        expected = train_naively(model, work, table)
        assert distance(update.groups["adapter"], expected.trained) < 2e-5
        assert distance(expected.trained, context.initial) > 1e-3
        assert update.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-4)


def test_a_late_clients_bits_are_those_of_a_shorter_training(model: MLLM, tmp_path: Path) -> None:
    """One epoch of two ends where one epoch alone ends."""
    whole = updates_of(context_of(model, tmp_path, config_of(epochs=1)))
    late = updates_of(context_of(model, tmp_path, config_of(epochs=2)), {c: math.ceil(n / 2) for c, n in enumerate(COUNTS)})
    longer = updates_of(context_of(model, tmp_path, config_of(epochs=2)))
    for client, update in whole.items():
        assert same(update.groups, late[client].groups)
        assert (update.examples, update.steps) == (late[client].examples, late[client].steps)
        assert not same(update.groups, longer[client].groups)
