"""Which clients are asked in a round, and which are waited for."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import Update
from fedmllm.config import TrainTable, validate
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build
from fedmllm.experiment.sweep import essential
from fedmllm.federation import FederationPlan, RoundRecord, federate, participants, sample_clients
from fedmllm.rng import stream
from fedmllm.simulation.clock import DAY, GROUP, Simulation
from fedmllm.simulation.devices import Device
from fedmllm.simulation.selection import Available, PowerOfChoice, policy_of
from fedmllm.tensors import State
from helpers import ADAPTER_INFO, FakeFleet, built, lora_adapter, quick, same

PLAN = FederationPlan(tuple(range(8)), 3, 12, 0.1, "cosine", 1, seed=0, adapter=ADAPTER_INFO)
SAMPLES = [10 * (client + 1) for client in range(8)]


def simulation(*kinds: Device, **settings: Any) -> Simulation:
    """Client k has device k modulo their number."""
    return Simulation(0, [kinds[client % len(kinds)] for client in range(8)], SAMPLES, **settings)


def at(seconds: float) -> State:
    return {GROUP: {"seconds": torch.tensor([seconds], dtype=torch.float64)}}


def run(plan: FederationPlan, resume: tuple[int, State] | None = None) -> tuple[list[RoundRecord], list[State], FakeFleet]:
    fleet = FakeFleet(built("fedavg"))
    outcome = list(federate(fleet.algorithm, fleet, plan, lora_adapter(), resume))
    return [record for record, _ in outcome], [state for _, state in outcome], fleet


def reasons(record: RoundRecord) -> dict[int, str]:
    return {int(refusal["client"]): str(refusal["why"]) for refusal in record.refused}


# The deadline


def test_who_does_not_finish_in_time_is_left_out() -> None:
    """A sample takes one second, so client k takes 10 (k + 1)."""
    records, _, fleet = run(replace(PLAN, simulation=simulation(Device(speed=1.0), deadline=40.0)))
    assert any(record.refused for record in records)
    trained = {info.round: set(messages) for info, messages in fleet.seen}
    for record in records:
        late = {client for client in record.sampled if client > 3}
        why = {client: f"did not finish in time: it takes {SAMPLES[client]} s, and train.deadline = 40" for client in late}
        assert reasons(record) == why
        assert trained.get(record.round, set()) == set(record.sampled) - late
        assert record.clock["seconds"] == (40.0 if late else SAMPLES[max(record.sampled)])


@pytest.mark.parametrize(("deadline", "late"), [(79.999, True), (80.0, False), (80.001, False), (1e9, False)])
def test_the_deadline_itself_is_in_time(deadline: float, late: bool) -> None:
    (record, *_), _, _ = run(replace(PLAN, per_round=8, simulation=simulation(Device(speed=1.0), deadline=deadline)))
    assert (7 in reasons(record)) == late


def test_a_deadline_that_everybody_meets_changes_nothing() -> None:
    _, free, _ = run(replace(PLAN, simulation=simulation(Device(speed=1.0))))
    _, bound, _ = run(replace(PLAN, simulation=simulation(Device(speed=1.0), deadline=1000.0)))
    assert same(free[-1], bound[-1])


def test_a_client_that_drops_out_is_waited_for_until_the_deadline() -> None:
    plan = replace(PLAN, per_round=8, simulation=simulation(Device(speed=1.0, dropout=0.9), deadline=75.0))
    records, _, _ = run(plan)
    assert {record.clock["seconds"] for record in records} == {75.0}
    assert {reasons(record)[7] for record in records if 7 in reasons(record)} >= {"dropped out"}


# Over-selection


@pytest.mark.parametrize(
    ("per_round", "share", "expected"),
    [
        (3, 0.0, 3),
        (3, 0.3, 4),
        (3, 1.0, 6),
        (3, 10.0, 8),
        (2, 0.5, 3),
        (1, 0.01, 2),
        (10, 0.3, 13),
        (10, 0.1, 11),
        (100, 0.1, 110),
    ],
)
def test_how_many_are_sampled(per_round: int, share: float, expected: int) -> None:
    clients = range(8 if per_round < 10 else 1000)
    plan = replace(PLAN, clients=clients, per_round=per_round, over_select=share)
    assert len(sample_clients(plan, 0)) == plan.draws == expected


def test_the_first_to_answer_are_used() -> None:
    records, _, fleet = run(replace(PLAN, over_select=1.0, simulation=simulation(Device(speed=1.0))))
    for record, (info, messages) in zip(records, fleet.seen, strict=True):
        assert len(record.sampled) == 6
        assert list(info.sampled) == list(messages) == record.sampled[:3], "those with the fewest samples"
        assert reasons(record) == dict.fromkeys(record.sampled[3:], "answered after 3 others had")
        assert record.clock["seconds"] == SAMPLES[record.sampled[2]]


def test_clients_on_top_replace_those_that_drop_out() -> None:
    plan = replace(PLAN, rounds=60, simulation=simulation(Device(speed=1.0, dropout=0.3)))
    used = [sum(3 - len(record.refused) for record in run(plan)[0])]
    records, _, _ = run(replace(plan, over_select=1.0))
    used.append(sum(6 - len(record.refused) for record in records))
    assert used[0] / 180 == pytest.approx(0.7, abs=0.1)
    assert used[1] / 180 > 0.93
    for record in records:
        if list(reasons(record).values()).count("dropped out") > 3:
            assert record.clock["seconds"] == SAMPLES[max(record.sampled)], "too few answered, so all were waited for"


@quick
@given(
    speeds=st.lists(st.floats(0.01, 100), min_size=8, max_size=8),
    dropout=st.floats(0, 0.99),
    deadline=st.one_of(st.just(math.inf), st.floats(0.1, 10_000)),
    needed=st.integers(1, 8),
    number=st.integers(0, 50),
)
def test_every_client_is_used_or_lost(speeds: list[float], dropout: float, deadline: float, needed: int, number: int) -> None:
    clock = simulation(*(Device(speed=speed, dropout=dropout) for speed in speeds), deadline=deadline)
    algorithm, info = built("fedavg"), PLAN.info(number, range(8))
    state = algorithm.init(lora_adapter())
    timed = clock.time(algorithm, state, dict.fromkeys(range(8), state), info, needed)
    assert sorted([*timed.used, *timed.lost]) == list(range(8))
    assert len(timed.used) <= needed
    times = {client: SAMPLES[client] / speeds[client] for client in range(8)}
    assert all(times[client] <= timed.seconds * (1 + 1e-12) for client in timed.used)
    assert timed.seconds <= min(deadline, max(times.values()) * (1 + 1e-12))
    late = [client for client, why in timed.lost.items() if why.startswith("answered after")]
    assert all(times[client] >= max(times[u] for u in timed.used) for client in late)
    patient = replace(clock, deadline=math.inf).time(algorithm, state, dict.fromkeys(range(8), state), info, 8)
    assert set(timed.used) <= set(patient.used), "waiting longer loses nobody"


# Available clients


def test_a_client_can_be_reached_for_its_share_of_every_day() -> None:
    shares = (1.0, 0.5, 0.25, 0.1)
    clock = simulation(*(Device(availability=share) for share in shares))
    times = np.linspace(0, DAY, 2001)[:-1]
    for day in (0, 1, 400):
        reached = np.mean([clock.reachable(now + day * DAY) for now in times], axis=0)
        assert reached == pytest.approx([*shares, *shares], abs=2e-3)
    assert (replace(clock, seed=1).reachable(0.3 * DAY) != clock.reachable(0.3 * DAY)).any()


def test_only_clients_that_can_be_reached_are_sampled() -> None:
    clock = simulation(Device(speed=1e-3, availability=0.4), waits=True)
    plan = replace(PLAN, rounds=40, simulation=clock, policy=Available(clock))
    records, states, _ = run(plan)
    ends = [0.0, *(float(state[GROUP]["seconds"]) for state in states)]
    for record, end in zip(records, ends[:-1], strict=True):
        began = record.clock["began"]
        assert began >= end, "time passes while nobody can be reached"
        assert record.sampled
        assert clock.reachable(began)[record.sampled].all()
        assert len(record.sampled) == min(3, clock.reachable(began).sum())
    assert len({client for record in records for client in record.sampled}) == 8
    resumed, after, _ = run(plan, (20, states[19]))
    assert same(after[-1], states[-1])
    assert [record.clock for record in resumed] == [record.clock for record in records[20:]]


def test_the_server_waits_for_the_next_client() -> None:
    clock = simulation(Device(availability=0.01), waits=True)
    for now in np.linspace(0, 3 * DAY, 50):
        begins = clock.begins(at(float(now)))
        assert clock.reachable(begins).any()
        assert begins == now or not clock.reachable((now + begins) / 2 - 1).any()
    assert replace(clock, waits=False).begins(at(12.5)) == 12.5


def test_clients_that_are_always_available_are_drawn_like_any() -> None:
    clock = simulation(Device(), waits=True)
    assert [sample_clients(replace(PLAN, simulation=clock, policy=Available(clock)), n, {}) for n in range(12)] == [
        sample_clients(PLAN, n) for n in range(12)
    ]


# Power of choice


def test_the_largest_losses_of_the_candidates_are_chosen() -> None:
    policy = PowerOfChoice(SAMPLES, candidates=8)
    losses = {0: 1.0, 1: 5.0, 2: 3.0, 3: 4.0, 4: 0.0, 5: 2.0, 6: 2.5, 7: 0.5}
    state = policy.learned({}, [Update(client, {}, 1, 1, {"loss": loss}) for client, loss in losses.items()])
    assert policy.choose(stream(0, "x"), 3, state) == [1, 3, 2]
    state = policy.learned(state, [Update(1, {}, 1, 1, {"loss": 0.25}), Update(4, {}, 1, 1, {"loss": 9.0})])
    assert policy.choose(stream(0, "x"), 3, state) == [4, 3, 2]
    chosen = replace(policy, candidates=4).choose(stream(0, "x"), 2, state)
    drawn = stream(0, "x").choice(8, size=4, replace=False, p=np.array(SAMPLES) / sum(SAMPLES)).tolist()
    assert sorted(chosen) == sorted(sorted(drawn, key=lambda c: [1.0, 0.25, 3.0, 4.0, 9.0, 2.0, 2.5, 0.5][c])[2:])


def test_clients_whose_loss_is_not_known_come_first() -> None:
    policy = PowerOfChoice([1] * 8, candidates=8)
    state = policy.learned({}, [Update(client, {}, 1, 1, {"loss": 100.0}) for client in range(6)])
    assert set(policy.choose(stream(0, "x"), 2, state)) == {6, 7}
    first = Counter(policy.choose(stream(seed, "x"), 1, state)[0] for seed in range(400))
    assert first[6] / 400 == pytest.approx(0.5, abs=0.08), "equal ones by the draw"


def test_candidates_are_drawn_in_proportion_to_their_samples() -> None:
    policy = PowerOfChoice([1, 1, 2, 4, 0], candidates=1)
    drawn = Counter(policy.choose(stream(seed, "x"), 1, {})[0] for seed in range(3000))
    assert [drawn[client] / 3000 for client in range(5)] == pytest.approx([1 / 9, 1 / 9, 2 / 9, 4 / 9, 1 / 9], abs=0.03)


def test_a_federation_by_choice_remembers_losses_across_a_resume() -> None:
    plan = replace(PLAN, policy=PowerOfChoice(SAMPLES, 6))
    records, states, _ = run(plan)
    assert len({client for record in records[:3] for client in record.sampled}) > 5, "unknown ones first"
    assert records[3].sampled != list(sample_clients(PLAN, 3))
    resumed, after, _ = run(plan, (6, states[5]))
    assert same(after[-1], states[-1])
    assert [record.sampled for record in resumed] == [record.sampled for record in records[6:]]
    assert not records[0].clock
    assert participants(plan) == list(range(8))
    assert participants(plan, start=12) == []


# The experiment file

FILE: dict[str, Any] = {"task": {"name": "shapes-qa"}, "partition": {"clients": 4}}
PHONES = {"profile": "phone", "dropout": [0.0]}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"train": {"deadline": 5.0}}, "train.deadline = 5.0 needs a virtual clock, and [clients] describes no devices; set"),
        ({"train": {"over_select": 0.5}}, "train.over_select = 0.5 needs a virtual clock"),
        ({"train": {"selection": "available"}}, "train.selection = 'available' needs a virtual clock"),
        ({"train": {"deadline": 0.0}}, "train.deadline: input should be greater than 0"),
        ({"train": {"over_select": -0.1}}, "train.over_select: input should be greater than or equal to 0"),
        ({"train": {"over_select": 11.0}}, "train.over_select: must be at most 10, because every client of it takes time"),
        ({"train": {"selection": "oort"}}, "train.selection: input should be 'uniform', 'available' or 'power-of-choice'"),
        ({"train": {"candidates": 3}}, 'train.candidates is for train.selection = "power-of-choice" alone; leave it out'),
        (
            {"train": {"selection": "power-of-choice", "candidates": 1}},
            "train.candidates = 1 must be at least train.clients_per_round = 2 and at most partition.clients = 4",
        ),
        ({"train": {"selection": "power-of-choice", "candidates": 5}}, "train.candidates = 5 must be at least"),
        (
            {"clients": PHONES, "train": {"deadline": 5.0}, "privacy": {"name": "user-level", "noise": 1.0, "delta": 0.01}},
            "train.deadline = 5.0 lets clients decide who else counts, and privacy.name = 'user-level' needs a draw",
        ),
        (
            {"train": {"selection": "power-of-choice"}, "fleet": {"name": "flower"}},
            "train.selection = 'power-of-choice' is for simulations, and the sites of fleet.name = \"flower\" check",
        ),
        (
            {"train": {"selection": "power-of-choice"}, "secure": {"name": "pairwise"}},
            "train.selection = 'power-of-choice' needs the losses of single clients or may leave a single one, which",
        ),
        (
            {"clients": PHONES, "train": {"deadline": 5.0}, "secure": {"name": "pairwise"}},
            "train.deadline = 5.0 needs the losses of single clients or may leave a single one",
        ),
    ],
)  # fmt: skip
def test_what_excludes_a_selection(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(validate({**FILE, **tables}))
    assert message in str(caught.value)


def test_what_a_selection_goes_with() -> None:
    for tables in (
        {"clients": PHONES, "train": {"over_select": 1.0}, "secure": {"name": "pairwise"}},
        {"clients": PHONES, "train": {"over_select": 1.0, "deadline": 3.0, "selection": "available"}},
        {"train": {"selection": "power-of-choice", "candidates": 4}, "robust": {"name": "median"}},
        {"clients": PHONES, "privacy": {"name": "user-level", "noise": 1.0, "delta": 0.01}},
    ):
        build(validate({**FILE, **tables}))


def test_baselines_select_nobody() -> None:
    chosen = validate({**FILE, "clients": PHONES, "train": {"over_select": 1.0, "deadline": 3.0, "selection": "available"}})
    for kind in ("local", "centralised", "zero-shot"):
        assert essential(chosen, kind) == essential(validate(FILE), kind)


def test_the_policy_of_an_experiment() -> None:
    clock = simulation(Device())
    assert policy_of(TrainTable(), clock, SAMPLES) is None
    assert policy_of(TrainTable(selection="available"), clock, SAMPLES) == Available(clock)
    assert policy_of(TrainTable(selection="power-of-choice", clients_per_round=3), None, SAMPLES) == PowerOfChoice(SAMPLES, 6)
    assert policy_of(TrainTable(selection="power-of-choice", candidates=4), None, SAMPLES) == PowerOfChoice(SAMPLES, 4)
