"""Clients that do unequal work: the clock decides on the steps that fit before a deadline, and algorithms use them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import Update, algorithms
from fedmllm.algorithms.screening import screen
from fedmllm.algorithms.toy_federation import per_step_of
from fedmllm.config import validate
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build
from fedmllm.experiment.sweep import essential
from fedmllm.federation import FederationPlan, RoundRecord, federate
from fedmllm.remote.fleet import RemoteFleet
from fedmllm.remote.protocol import Job, ProtocolError, Reply
from fedmllm.simulation.clock import GROUP, Simulation
from fedmllm.simulation.devices import Device
from fedmllm.tensors import State, Tensors, nbytes
from helpers import (
    ADAPTER_INFO,
    LR,
    FakeFleet,
    examples_of,
    lora_adapter,
    quick,
    round_info,
    same,
    steps_of,
    target,
)

CLIENTS = range(8)
PER_STEP = [per_step_of(client) for client in CLIENTS]
PLAN = FederationPlan(CLIENTS, 8, 4, 0.1, "constant", 1, seed=0, adapter=ADAPTER_INFO, per_step=PER_STEP)
ADAPTER = lora_adapter()
SAMPLES = [examples_of(client) for client in CLIENTS]
SECOND = Device(speed=1.0)
"""A sample takes a second, so client k takes 10 (k + 1)."""


def simulation(deadline: float, device: Device = SECOND, **settings: Any) -> Simulation:
    partial = {"epochs": [1] * len(CLIENTS), "per_step": PER_STEP} | settings
    return Simulation(0, [device] * len(CLIENTS), SAMPLES, deadline, **partial)


def run(
    plan: FederationPlan, name: str = "fedavg", resume: tuple[int, State] | None = None
) -> tuple[list[RoundRecord], list[State], FakeFleet]:
    fleet = FakeFleet(algorithms.build(name, {}))
    outcome = list(federate(fleet.algorithm, fleet, plan, ADAPTER, resume))
    return [replace(record, seconds=0.0) for record, _ in outcome], [state for _, state in outcome], fleet


# How many steps fit


@pytest.mark.parametrize(
    ("size", "epochs", "per_step", "speed", "left", "steps", "seconds"),
    [
        (10, 1, 4, 1.0, 3.9, 0, None),
        (10, 1, 4, 1.0, 4.0, 1, 4.0),
        (10, 1, 4, 1.0, 7.9, 1, 4.0),
        (10, 1, 4, 1.0, 9.9, 2, 8.0),  # the third step has two samples
        (10, 2, 4, 1.0, 10.0, 3, 10.0),
        (10, 2, 4, 1.0, 13.9, 3, 10.0),
        (10, 2, 4, 1.0, 18.0, 5, 18.0),
        (10, 3, 4, 1.0, 25.0, 7, 24.0),
        (10, 1, 4, 0.5, 16.0, 2, 16.0),
        (10, 1, 4, 100.0, 0.05, 1, 0.04),
        (3, 5, 8, 1.0, 14.0, 4, 12.0),  # one step per epoch
        (1, 1, 8, 1.0, 0.5, 0, None),
        (7, 1, 1, 7.0, 0.5, 3, 3 / 7),
        (0, 1, 4, 1.0, 0.0, 0, None),
    ],
)
def test_how_many_steps_fit(
    size: int, epochs: int, per_step: int, speed: float, left: float, steps: int, seconds: float | None
) -> None:
    made = Simulation(0, [Device(speed)], [size * epochs], left + 3.0, epochs=[epochs], per_step=[per_step])
    assert made.steps_in_time(0, 3.0) == steps
    if seconds is not None:
        assert made.seconds(0, steps) == pytest.approx(seconds)


@quick
@given(
    size=st.integers(1, 40),
    epochs=st.integers(1, 4),
    per_step=st.integers(1, 12),
    speed=st.floats(0.1, 10),
    left=st.floats(0, 99),
)
def test_the_steps_are_those_that_a_plain_count_finds(size: int, epochs: int, per_step: int, speed: float, left: float) -> None:
    made = Simulation(0, [Device(speed)], [size * epochs], left, epochs=[epochs], per_step=[per_step])
    done = samples = 0
    for _ in range(epochs):
        for start in range(0, size, per_step):
            samples += min(per_step, size - start)
            done += samples / speed <= left
    assert made.steps_in_time(0, 0.0) == done
    assert made.all_steps(0) == epochs * len(range(0, size, per_step))
    assert made.seconds(0, made.all_steps(0)) == size * epochs / speed


# Rounds


def expected_steps(client: int, deadline: float) -> int:
    """Of a client that computes one example per second."""
    return steps_of(client) if examples_of(client) <= deadline else int(deadline // per_step_of(client))


def test_late_clients_make_the_steps_that_fit() -> None:
    records, _, fleet = run(replace(PLAN, simulation=simulation(25.0)))
    steps = {client: expected_steps(client, 25.0) for client in CLIENTS}
    assert steps == {0: 2, 1: 3, 2: 3, 3: 1, 4: 1, 5: 1, 6: 0, 7: 0}
    for record, (info, messages) in zip(records, fleet.seen, strict=True):
        assert set(messages) == set(info.sampled) == {0, 1, 2, 3, 4, 5}
        assert info.steps == {2: 3, 3: 1, 4: 1, 5: 1}
        assert record.clock["lost"] == [6, 7]
        assert record.clock["partial"] == {2: 3 / 4, 3: 1 / 2, 4: 1 / 3, 5: 1 / 4}
        assert {c: needs["compute"] for c, needs in record.clock["clients"].items() if c < 6} == {
            0: 10.0, 1: 20.0, 2: 24.0, 3: 20.0, 4: 17.0, 5: 15.0
        }  # fmt: skip
        assert [refusal["why"] for refusal in record.refused] == [
            f"did not finish a step in time: it takes {per_step_of(client)} s, and train.deadline = 25" for client in (6, 7)
        ]
        assert (record.steps, record.clock["seconds"]) == (2 + 3 + 3 + 1 + 1 + 1, 25.0)
        json.dumps(asdict(record), allow_nan=False)


def test_transfers_leave_less_time_and_a_round_ends_with_its_last_client() -> None:
    slow = Device(speed=1.0, downlink=8e-6 * nbytes(ADAPTER), uplink=4e-6 * nbytes(ADAPTER))  # 1 s down, 2 s up
    (record, *_), _, _ = run(replace(PLAN, simulation=simulation(38.0, slow)))
    assert record.clock["partial"] == {3: 1 / 2, 4: 2 / 3, 5: 2 / 4, 6: 1 / 2, 7: 1 / 3}
    assert not record.clock["lost"]
    assert record.clock["seconds"] == pytest.approx(35 + 3.0), "client 6 makes one step of 35 examples"


@pytest.mark.parametrize("name", ["fedavg", "fednova", "scaffold", "flora"])
def test_a_deadline_that_everybody_meets_is_none(name: str) -> None:
    _, free, _ = run(PLAN, name)
    records, bound, _ = run(replace(PLAN, simulation=simulation(80.0)), name)
    dropped, others, _ = run(replace(PLAN, simulation=simulation(80.0, epochs=[], per_step=[])), name)
    assert records == dropped
    for state, other, without in zip(bound, others, free, strict=True):
        assert same(state, other)
        assert same({group: tensors for group, tensors in state.items() if group != GROUP}, without)


def test_a_resumed_run_does_the_same_parts() -> None:
    plan = replace(PLAN, per_round=4, rounds=6, simulation=simulation(25.0, replace(SECOND, dropout=0.2)))
    for name in ("fedavg", "fednova", "scaffold"):
        records, states, _ = run(plan, name)
        resumed, after, _ = run(plan, name, (3, states[2]))
        assert [record.clock for record in resumed] == [record.clock for record in records[3:]]
        if name != "scaffold":  # whose toy clients do not keep their memory
            assert same(after[-1], states[-1])


def test_over_selection_waits_for_no_part_that_it_does_not_need() -> None:
    (record, *_), _, fleet = run(replace(PLAN, per_round=2, over_select=3.0, simulation=simulation(25.0)))
    used = set(fleet.seen[0][0].sampled)
    assert used == {0, 5}, "10 s, and one step of 15 examples"
    assert record.clock["partial"] == {5: 1 / 4}
    assert fleet.seen[0][0].steps == {5: 1}
    assert record.clock["seconds"] == 15.0


# What algorithms make of it


def after_steps(client: int, start: Tensors, steps: int) -> Tensors:
    """Plain gradient descent, written out."""
    w = dict(start)
    for _ in range(steps):
        w = {name: t - LR * (t - target(client, name, t.shape)) for name, t in w.items()}
    return w


def test_a_late_client_has_the_adapter_of_one_that_stops() -> None:
    _, _, fleet = run(replace(PLAN, rounds=1, simulation=simulation(25.0)))
    info, messages = fleet.seen[0]
    for update in FakeFleet(fleet.algorithm).train(info, messages):
        steps = expected_steps(update.client, 25.0)
        assert (update.steps, update.examples) == (steps, min(steps * per_step_of(update.client), SAMPLES[update.client]))
        assert same({"adapter": update.groups["adapter"]}, {"adapter": after_steps(update.client, ADAPTER, steps)})


def test_fednova_divides_by_the_steps_that_were_made() -> None:
    """w + Σ p_k τ_k · Σ p_k (w_k − w) / τ_k, with p_k the share of all examples that were trained on."""
    _, (state, *_), _ = run(replace(PLAN, simulation=simulation(25.0)), "fednova")
    steps = {client: expected_steps(client, 25.0) for client in range(6)}
    examples = {client: min(count * per_step_of(client), SAMPLES[client]) for client, count in steps.items()}
    p = {client: count / sum(examples.values()) for client, count in examples.items()}
    effective = sum(p[client] * steps[client] for client in p)
    for name, w in ADAPTER.items():
        mean = sum(p[c] * (after_steps(c, ADAPTER, steps[c])[name].double() - w.double()) / steps[c] for c in p)
        assert torch.allclose(state["adapter"][name].double(), w.double() + effective * mean, atol=1e-6)


def test_scaffold_averages_gradients_over_the_steps_that_were_made() -> None:
    _, (state, *_), _ = run(replace(PLAN, simulation=simulation(25.0)), "scaffold")
    for name, w in ADAPTER.items():
        total = torch.zeros_like(w, dtype=torch.float64)
        for client in range(6):  # option II of the paper: (w − w_k) / (τ_k lr)
            steps = expected_steps(client, 25.0)
            total += (w.double() - after_steps(client, ADAPTER, steps)[name].double()) / (steps * LR)
        assert torch.allclose(state["control"][name].double(), total / len(CLIENTS), atol=1e-5)


# Updates that are refused


@pytest.mark.parametrize(
    ("examples", "steps", "why"),
    [
        (8, 2, None),
        (5, 2, None),
        (4, 1, None),
        (12, 3, "3 steps, and was asked for 2"),
        (2**40, 2**39, f"{2**39} steps, and was asked for 2"),
        (9, 2, "9 samples in 2 steps of 4"),
        (5, 1, "5 samples in 1 steps of 4"),
    ],
)
def test_more_work_than_was_asked_for_is_refused(examples: int, steps: int, why: str | None) -> None:
    info = replace(round_info(sampled=(0, 1)), steps={1: 2})
    sent = Update(1, {"adapter": ADAPTER}, examples, steps)
    algorithm = algorithms.build("fedavg", {})
    _, refused = screen([sent], algorithm, algorithm.init(ADAPTER), info, per_step=[4, 4])
    assert [row["why"] for row in refused] == ([why] if why else [])
    free = replace(sent, client=0)
    _, refused = screen([free], algorithm, algorithm.init(ADAPTER), info, per_step=[4, 4])
    assert bool(refused) == (why is not None and "samples" in why), "client 0 may make all its steps"


# To clients elsewhere


class Kept:
    """A transport that keeps the jobs and answers nothing."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def exchange(self, jobs: Mapping[int, Job], timeout: float) -> Mapping[int, Reply]:
        self.jobs += jobs.values()
        return {}


def test_jobs_carry_the_steps() -> None:
    kept = Kept()
    info = replace(round_info(sampled=(0, 1)), steps={1: 2})
    RemoteFleet(kept, "ab" * 8, "", 1.0).train(info, {0: {}, 1: {}})
    for job in kept.jobs:
        assert job.steps == {1: 2}
        assert Job.of(job.header(), {}) == job
    assert "steps" not in json.loads(Job("train", "ab" * 8, "").header()), "an earlier release knows no such field"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([[1, 0]], "it asks for no optimizer steps"),
        ([[1, -3]], "it asks for no optimizer steps"),
        ([[1, 2.5]], "not integers of 63 bits"),
        ([[1, 2**64]], "not integers of 63 bits"),
        ([["a", 1]], "not integers of 63 bits"),
        ([[1, True]], "not integers of 63 bits"),
        (5, "not a job"),
    ],
)
def test_a_job_with_other_steps_is_none(steps: Any, message: str) -> None:
    header = json.loads(Job("train", "ab" * 8, "").header()) | {"steps": steps}
    with pytest.raises(ProtocolError, match=message):
        Job.of(json.dumps(header), {})


# The experiment file

FILE: dict[str, Any] = {"task": {"name": "shapes-qa"}, "partition": {"clients": 4}}
PHONES = {"profile": "phone", "dropout": [0.0]}
LATE = {"late": "partial", "deadline": 5.0}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"clients": PHONES, "train": {"late": "partial"}},
            'train.late = "partial" is for clients that train.deadline is too early for; set a deadline, or leave it out.',
        ),
        ({"train": {"late": "partial"}}, 'train.late = "partial" is for clients that train.deadline is too early for'),
        ({"train": {"late": "half"}}, "train.late: input should be 'drop' or 'partial'"),
        ({"clients": {"epochs": [1, 0]}}, "clients.epochs.1: input should be greater than or equal to 1"),
        ({"clients": {"epochs": [2000]}}, "clients.epochs.0: must be at most 1000, because a client repeats its data"),
        ({"clients": {"epochs": 2}}, "clients.epochs: must be a list"),
        ({"clients": {"batch_size": [0]}}, "clients.batch_size.0: input should be greater than or equal to 1"),
        ({"clients": {"batch_size": [1.5]}}, "clients.batch_size.0: input should be a valid integer"),
        ({"clients": {"batch_size": [10**6]}}, "clients.batch_size.0: must be at most 65536, because a batch is in memory"),
        ({"clients": PHONES, "train": LATE, "fleet": {"name": "flower"}}, "train.deadline = 5.0 is for simulations"),
    ],
)
def test_what_excludes_unequal_work(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(validate({**FILE, **tables}))
    assert message in str(caught.value)


def test_clients_have_the_entries_of_their_number() -> None:
    config = validate({**FILE, "clients": {"epochs": [1, 2, 3], "batch_size": [8, 2]}, "train": {"accumulate": 2}})
    assert [config.train_of(client).epochs for client in range(5)] == [1, 2, 3, 1, 2]
    assert [config.train_of(client).batch_size for client in range(5)] == [8, 2, 8, 2, 8]
    assert config.largest_batches([1, 3]).batch_size == 2
    assert config.largest_batches(range(4)).batch_size == 8
    assert config.largest_batches([]) == config.train
    assert validate(FILE).train_of(3) == validate(FILE).train
    own = essential(config, "local").clients
    assert (own.epochs, own.batch_size) == ((1, 2, 3), (8, 2)), "also of clients that train alone"
    assert not essential(config, "centralised").clients.epochs


def test_the_clock_counts_the_epochs_of_every_client() -> None:
    tables = {"clients": {"speed": [1.0], "epochs": [1, 3], "batch_size": [4, 8]}, "train": {"epochs": 7, "accumulate": 2}}
    dropping = Simulation.of(validate({**FILE, **tables}), [5, 6, 7, 8])
    assert dropping is not None
    assert dropping.examples == [5, 18, 7, 24]
    assert not dropping.per_step
    tables["train"] |= LATE
    partial = Simulation.of(validate({**FILE, **tables}), [5, 6, 7, 8])
    assert partial is not None
    assert (partial.epochs, partial.per_step, partial.deadline) == ([1, 3, 1, 3], [8, 16, 8, 16], 5.0)
