"""Asynchronous rounds, against synchronous ones, against figures computed by hand, and after a resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedmllm.algorithms import Update, failed
from fedmllm.algorithms.asynchronous import Asynchronous, asynchronies, staleness_weight
from fedmllm.config import validate
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build
from fedmllm.experiment.sweep import essential
from fedmllm.federation import FederationPlan, RoundRecord, TooFewUpdates, federate, participants
from fedmllm.simulation.clock import Simulation
from fedmllm.simulation.devices import Device
from fedmllm.simulation.flights import Traffic, without_traffic
from fedmllm.storage.state_file import load_state, save_state
from fedmllm.tensors import State, Tensors, add, distance, scale, subtract
from helpers import ADAPTER_INFO, FakeFleet, built, local_sgd, lora_adapter, same, tensors

ADAPTER = lora_adapter()
PLAN = FederationPlan(tuple(range(8)), 3, 6, 0.1, "cosine", 1, seed=0, adapter=ADAPTER_INFO)


def simulation(*kinds: Device, clients: int = 8) -> Simulation:
    """Client k has device k modulo their number. It trains on ten samples."""
    return Simulation(0, [kinds[client % len(kinds)] for client in range(clients)], [10] * clients)


def run(
    plan: FederationPlan, algorithm: str = "fedavg", resume: tuple[int, State] | None = None, alter: Any = None, **options: Any
) -> tuple[list[RoundRecord], list[State], FakeFleet]:
    fleet = FakeFleet(built(algorithm, **options), alter)
    outcome = list(federate(fleet.algorithm, fleet, plan, ADAPTER, resume))
    return [record for record, _ in outcome], [state for _, state in outcome], fleet


def method(name: str, **options: Any) -> Asynchronous:
    made = asynchronies.build(name, options)
    assert made is not None
    return made


def without_time(record: RoundRecord) -> RoundRecord:
    return replace(record, seconds=0.0, clock={})


# Staleness


@pytest.mark.parametrize(
    ("kind", "a", "b", "expected"),
    [
        ("constant", None, 4, [1, 1, 1, 1, 1, 1, 1]),
        ("constant", 3.0, 0, [1, 1, 1, 1, 1, 1, 1]),
        ("polynomial", None, 4, [1, 2**-0.5, 3**-0.5, 0.5, 5**-0.5, 6**-0.5, 7**-0.5]),
        ("polynomial", 1.0, 4, [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6, 1 / 7]),
        ("polynomial", 0.0, 4, [1, 1, 1, 1, 1, 1, 1]),
        ("hinge", None, 4, [1, 1, 1, 1, 1, 1 / 11, 1 / 21]),
        ("hinge", 0.5, 1, [1, 1, 1 / 1.5, 1 / 2, 1 / 2.5, 1 / 3, 1 / 3.5]),
        ("hinge", 10.0, 0, [1, 1 / 11, 1 / 21, 1 / 31, 1 / 41, 1 / 51, 1 / 61]),
    ],
)
def test_the_weight_of_staleness(kind: Any, a: float | None, b: int, expected: list[float]) -> None:
    assert [staleness_weight(kind, a, b)(tau) for tau in range(7)] == pytest.approx(expected)


def test_what_is_given_to_the_algorithm() -> None:
    now, sent, update = tensors(w=[10.0]), tensors(w=[2.0]), Update(0, {"adapter": tensors(w=[4.0])}, 1, 1)
    buffered = method("fedbuff", staleness="polynomial", a=1.0).rebased(update, 3, now, sent)
    assert buffered.groups["adapter"]["w"].tolist() == [10.0 + 0.25 * (4.0 - 2.0)]
    late = method("fedbuff", staleness="constant").rebased(update, 3, now, sent)
    assert late.groups["adapter"]["w"].tolist() == [12.0], "a change is moved, even at full weight"
    mixed = method("fedasync", alpha=0.5, staleness="polynomial", a=1.0).rebased(update, 3, now, sent)
    assert mixed.groups["adapter"]["w"].tolist() == [10.0 + 0.125 * (4.0 - 10.0)]
    assert method("fedasync", alpha=1.0, staleness="constant").rebased(update, 3, now, sent) is update
    assert method("fedbuff").rebased(update, 0, now, now) is update


# Identities


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedavg", {}),
        ("fedavg", {"weighting": "uniform", "server_lr": 0.5}),
        ("fedadam", {}),
        ("fedavgm", {}),
        ("ffa-lora", {}),
    ],
)
@pytest.mark.parametrize("staleness", ["constant", "polynomial", "hinge"])
def test_a_buffer_of_all_clients_that_are_equally_fast_is_synchronous(
    name: str, options: dict[str, Any], staleness: str
) -> None:
    plan = replace(PLAN, simulation=simulation(Device(speed=2.0, uplink=1.0)))
    expected, states, _ = run(plan, name, **options)
    buffered = replace(plan, asynchronous=method("fedbuff", buffer=3, staleness=staleness))
    records, after, _ = run(buffered, name, **options)
    assert [without_time(record) for record in records] == [without_time(record) for record in expected]
    assert [record.clock["began"] for record in records] == pytest.approx([record.clock["began"] for record in expected])
    for one, other in zip(states, after, strict=True):
        assert same(without_traffic(one), without_traffic(other)), "bit for bit"


def test_mixing_in_whole_updates_one_after_another_is_fedavg_with_one_client() -> None:
    plan = replace(PLAN, per_round=1, simulation=simulation(Device(speed=2.0), Device(speed=3.0)))
    _, states, _ = run(plan)
    _, after, _ = run(replace(plan, asynchronous=method("fedasync", alpha=1.0)))
    assert all(same(without_traffic(a), without_traffic(b)) for a, b in zip(states, after, strict=True))


# By hand: client 0 needs 1 s and client 1 needs 3.5 s

TWO = replace(PLAN, clients=(0, 1), per_round=2, schedule="constant", rounds=5, seed=1)
FAST_AND_SLOW = simulation(Device(speed=10.0), Device(speed=10 / 3.5), clients=2)


def trained(client: int, start: Tensors) -> Tensors:
    return dict(local_sgd(client, start, built("fedavg").rule({"adapter": start}, {}, None), 0.1).trained)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fedbuff", "fedasync"])
def test_a_slow_client_arrives_late(name: str) -> None:
    """Client 0 arrives at 1, 2 and 3 s and each time gets the new adapter; client 1 at 3.5 s, three steps late."""
    options = {"buffer": 1} if name == "fedbuff" else {"alpha": 0.6}
    asynchronous = method(name, staleness="polynomial", a=1.0, **options)
    records, states, _ = run(replace(TWO, simulation=FAST_AND_SLOW, asynchronous=asynchronous))
    assert [record.sampled for record in records] == [[0], [0], [0], [1], [0]]
    assert [record.clock["began"] + record.clock["seconds"] for record in records] == pytest.approx([1, 2, 3, 3.5, 4])
    taus = [record.clock["clients"][record.sampled[0]]["staleness"] for record in records]
    assert taus == [0, 0, 0, 3, 1]
    start, adapters = ADAPTER, [ADAPTER]
    for client, tau in zip([0, 0, 0, 1, 0], taus, strict=True):
        w, sent = adapters[-1], adapters[-1 - tau]
        weight = 1 / (1 + tau)
        if name == "fedbuff":
            w = add(w, scale(subtract(trained(client, sent), sent), weight))
        else:
            w = add(scale(w, 1 - 0.6 * weight), scale(trained(client, sent), 0.6 * weight))
        adapters.append(w)
    for state, expected in zip(states, adapters[1:], strict=True):
        assert distance(state["adapter"], expected) < 1e-5
    assert distance(states[-1]["adapter"], start) > 0.1


def test_who_trains_and_what_travels() -> None:
    asynchronous = method("fedbuff", buffer=2)
    plan = replace(PLAN, per_round=4, rounds=20, simulation=simulation(Device(speed=1.0), Device(speed=3.0), Device(speed=8.0)))
    records, states, fleet = run(replace(plan, asynchronous=asynchronous))
    size = sum(tensor.numel() * tensor.element_size() for tensor in ADAPTER.values())
    sent = dict.fromkeys(range(20), 0)
    for info, messages in fleet.seen:
        sent[info.round] += len(messages)
        assert len(messages) <= 4
    times = [record.clock["began"] for record in records]
    assert times == sorted(times)
    for record, state in zip(records, states, strict=True):
        assert len(record.sampled) == len(set(record.sampled)) == 2
        assert record.bytes_up == {"adapter": 2 * size}
        assert record.bytes_down.get("adapter", 0) == sent[record.round] * size
        traffic = Traffic.of(state)
        assert len(traffic.flights) <= 4
        assert {flight.version for flight in traffic.flights} == set(traffic.sent)
        assert all(flight.arrives >= traffic.now for flight in traffic.flights)
        assert same(traffic.to_state() | without_traffic(state), state)
    _, _, synchronous = run(plan)
    assert sum(len(messages) for _, messages in synchronous.seen) == 4 * 20
    waited = run(plan)[0][-1].clock
    assert times[-1] < 0.5 * waited["began"], "a step takes less time than a round"
    stale = [figures["staleness"] for record in records for figures in record.clock["clients"].values()]
    assert max(stale) > 1
    assert participants(replace(plan, asynchronous=asynchronous)) == list(range(8))


@pytest.mark.parametrize("done", [1, 2, 5, 9])
def test_a_resumed_run_ends_the_same_bit_for_bit(done: int, tmp_path: Path) -> None:
    devices = (Device(speed=1.0), Device(speed=3.0, dropout=0.3), Device(speed=8.0))
    plan = replace(PLAN, per_round=4, rounds=10, simulation=simulation(*devices), asynchronous=method("fedbuff", buffer=2))
    records, states, _ = run(plan, "fedadam")
    save_state(tmp_path / "state.safetensors", states[done - 1])
    resumed, after, _ = run(plan, "fedadam", resume=(done, load_state(tmp_path / "state.safetensors")[0]))
    assert same(after[-1], states[-1])
    assert [replace(r, seconds=0.0) for r in resumed] == [replace(r, seconds=0.0) for r in records[done:]]


# Clients that never answer


def out_of_reach(*clients: int) -> Callable[[int, list[Update]], list[Update]]:
    """What a fleet answers if it cannot train these clients, such as one in other processes."""
    return lambda _, updates: [failed(u.client, "its äctor died") if u.client in clients else u for u in updates]


@pytest.mark.parametrize("done", [1, 3])
def test_a_client_that_cannot_be_trained_is_replaced_and_refused_when_it_would_arrive(done: int, tmp_path: Path) -> None:
    asynchronous = method("fedbuff", buffer=2)
    plan = replace(PLAN, per_round=4, simulation=simulation(Device(speed=1.0), Device(speed=3.0)), asynchronous=asynchronous)
    records, states, _ = run(plan, alter=out_of_reach(1, 4))
    refusals = [refusal for record in records for refusal in record.refused]
    assert {(row["client"], row["why"]) for row in refusals} == {(1, "its äctor died"), (4, "its äctor died")}
    assert all(len(record.sampled) == 2 + len(record.refused) and not record.clock["lost"] for record in records)
    assert all(same(Traffic.of(state).to_state() | without_traffic(state), state) for state in states)
    save_state(tmp_path / "state.safetensors", states[done - 1])
    resume = done, load_state(tmp_path / "state.safetensors")[0]
    resumed, after, _ = run(plan, alter=out_of_reach(1, 4), resume=resume)
    assert same(after[-1], states[-1])
    assert [record.refused for record in resumed] == [record.refused for record in records[done:]]


def test_a_step_ends_the_run_if_nobody_can_be_trained() -> None:
    plan = replace(PLAN, simulation=simulation(Device(speed=1.0)), asynchronous=method("fedasync"))
    with pytest.raises(TooFewUpdates, match=r"round 0: 0 usable updates, .*client 7: its äctor died"):
        run(plan, alter=out_of_reach(*range(8)))


def test_a_client_that_drops_out_is_replaced_after_its_time() -> None:
    plan = replace(PLAN, rounds=30, asynchronous=method("fedbuff", buffer=2))
    records, _, fleet = run(replace(plan, simulation=simulation(Device(speed=1.0, dropout=0.3))))
    lost = [refusal for record in records for refusal in record.refused]
    assert {refusal["why"] for refusal in lost} == {"dropped out"}
    assert len(lost) / (len(lost) + 60) == pytest.approx(0.3, abs=0.12)
    for record in records:
        assert len(record.sampled) == 2 + len(record.refused)
    assert all(info.sampled == tuple(messages) for info, messages in fleet.seen)


def test_a_step_for_which_too_few_are_left_is_taken_with_those_who_came() -> None:
    plan = replace(PLAN, simulation=simulation(Device(dropout=0.9)), asynchronous=method("fedbuff", buffer=8))
    records, _, _ = run(replace(plan, rounds=20))
    assert {len(record.sampled) for record in records} == {8}
    assert any(len(record.refused) == 8 for record in records), "the model stays as it is"
    with pytest.raises(TooFewUpdates, match="usable updates"):
        run(replace(plan, rounds=20, min_updates=3))


# The experiment file

FILE: dict[str, Any] = {
    "task": {"name": "shapes-qa"}, "partition": {"clients": 4}, "clients": {"profile": "phone", "dropout": [0.0]},
    "asynchronous": {"name": "fedbuff", "buffer": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"clients": {}}, "asynchronous.name: 'fedbuff' needs a virtual clock, and [clients] describes no devices; set"),
        ({"asynchronous": {"name": "fedbuf"}}, "asynchronous.name: there is no asynchronous 'fedbuf'; did you mean 'fedbuff'?"),
        ({"asynchronous": {"name": "fedbuff", "buffer": 0}}, "asynchronous: buffer = 0 must be at least 1"),
        ({"asynchronous": {"name": "fedbuff", "buffer": 5}}, "uses each client once in a step, and buffer = 5 is more than"),
        ({"asynchronous": {"name": "fedbuff", "a": -1.0}}, "asynchronous: a = -1.0 must not be negative"),
        ({"asynchronous": {"name": "fedbuff", "staleness": "linear"}}, "asynchronous.staleness: input should be 'constant'"),
        ({"asynchronous": {"name": "fedasync", "alpha": 0.0}}, "asynchronous: alpha = 0.0 must be above 0 and at most 1"),
        ({"asynchronous": {"name": "fedasync", "alpha": 1.1}}, "asynchronous: alpha = 1.1 must be above 0 and at most 1"),
        ({"asynchronous": {"name": "fedasync"}, "train": {"min_updates": 2}}, "makes steps of 1 updates, fewer than"),
        ({"train": {"deadline": 3.0}}, "waits for no round, so leave out train.selection, train.over_select and train.dead"),
        ({"train": {"over_select": 1.0}}, "waits for no round"),
        ({"train": {"selection": "power-of-choice"}}, "waits for no round"),
        ({"fleet": {"name": "flower"}, "clients": {}}, 'goes by a virtual clock, and fleet.name = "flower" trains on real'),
        ({"fleet": {"name": "flower"}}, 'simulate devices, and fleet.name = "flower" trains on real ones'),
        ({"secure": {"name": "pairwise"}}, "adds up what arrives, and secure.name = 'pairwise' masks the updates of a round"),
        ({"privacy": {"name": "user-level", "noise": 1.0, "delta": 0.01}}, "uses whoever arrives, and privacy.name = "),
        ({"robust": {"name": "norm-clip"}}, "would take late clients for bad ones"),
        ({"compression": {"name": "int8"}}, "weighs adapters, and compression.name = 'int8' packs their changes"),
        ({"algorithm": {"name": "fedsa-lora"}}, "has one model for all, and algorithm.name = 'fedsa-lora' leaves part of it"),
        ({"algorithm": {"name": "fednova"}}, "weighs single adapters, and algorithm.name = 'fednova' does more than average"),
        ({"algorithm": {"name": "scaffold"}}, "weighs single adapters, and algorithm.name = 'scaffold' does more than average"),
        ({"algorithm": {"name": "flora"}}, "algorithm.name = 'flora'"),
        ({"algorithm": {"name": "fedsvd"}}, "compares adapters of several steps, and algorithm.name = 'fedsvd' makes new"),
        ({"algorithm": {"name": "feddyn"}}, "has no rounds that clients could remember, as algorithm.name = 'feddyn' lets"),
        ({"algorithm": {"name": "rolora"}}, "adds up updates of several rounds, and in algorithm.name = 'rolora' they have"),
    ],
)  # fmt: skip
def test_what_excludes_asynchronous_rounds(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(validate({**FILE, **tables}))
    assert message in str(caught.value)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi", "fedadagrad", "ffa-lora"])
def test_what_it_goes_with(algorithm: str) -> None:
    for name in ("fedbuff", "fedasync"):
        tables = {"algorithm": {"name": algorithm}, "asynchronous": {"name": name}, "partition": {"clients": 10}}
        for fleet in ("in-process", "ray"):
            parts = build(validate({**FILE, **tables, "fleet": {"name": fleet}}))
            assert parts.asynchronous is not None
            assert parts.asynchronous.buffer == (10 if name == "fedbuff" else 1)


def test_baselines_are_not_asynchronous() -> None:
    for kind in ("local", "centralised", "zero-shot"):
        assert essential(validate(FILE), kind) == essential(validate({**FILE, "asynchronous": {"name": "none"}}), kind)
