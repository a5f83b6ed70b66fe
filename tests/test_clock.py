"""Simulated devices and their clock. All figures are computed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import call
from fedmllm.algorithms import algorithms
from fedmllm.config import ClientsTable, validate
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build
from fedmllm.experiment.sweep import essential
from fedmllm.federation import FederationPlan, RoundRecord, TooFewUpdates, federate
from fedmllm.report.convergence import curve
from fedmllm.runs.kept import kept_by_group
from fedmllm.runs.result import simulated_seconds
from fedmllm.simulation.clock import GROUP, Simulation
from fedmllm.simulation.devices import Device, devices, devices_of
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State, nbytes
from helpers import ADAPTER_INFO, FakeFleet, examples_of, lora_adapter, same

PLAN = FederationPlan(tuple(range(8)), 3, 4, 0.1, "cosine", 1, seed=0, adapter=ADAPTER_INFO)
ADAPTER = lora_adapter()
BYTES = nbytes(ADAPTER)
SAMPLES = [10 * (client + 1) for client in range(8)]
"""As many as the toy clients say that they trained on."""
SLOW = Device(speed=2.0, downlink=8e-6 * BYTES, uplink=4e-6 * BYTES)
"""Downloads the adapter in 1 s and uploads it in 2 s."""


def simulation(*kinds: Device, **settings: Any) -> Simulation:
    """Client k has device k modulo their number."""
    return Simulation(0, [kinds[client % len(kinds)] for client in range(8)], SAMPLES, **settings)


def run(
    plan: FederationPlan, name: str = "fedavg", resume: tuple[int, State] | None = None
) -> tuple[list[RoundRecord], list[State], FakeFleet]:
    fleet = FakeFleet(algorithms.build(name, {}))
    outcome = list(federate(fleet.algorithm, fleet, plan, ADAPTER, resume))
    return [record for record, _ in outcome], [state for _, state in outcome], fleet


def without_clock(record: RoundRecord) -> RoundRecord:
    return replace(record, seconds=0.0, clock={})


# Devices


@pytest.mark.parametrize(
    ("device", "samples", "down", "up", "expected"),
    [
        (Device(), 10, 1000, 1000, (0.0, 0.0)),
        (Device(speed=4.0), 10, 1000, 1000, (2.5, 0.0)),
        (Device(downlink=8.0), 10, 1_000_000, 0, (0.0, 1.0)),
        (Device(uplink=2.0), 10, 1_000_000, 500_000, (0.0, 2.0)),
        (Device(speed=0.5, downlink=16.0, uplink=1.0), 3, 4_000_000, 1_000_000, (6.0, 10.0)),
        (SLOW, 20, BYTES, BYTES, (10.0, 3.0)),
    ],
)
def test_what_a_client_needs(device: Device, samples: int, down: int, up: int, expected: tuple[float, float]) -> None:
    assert device.seconds(samples, down, up) == pytest.approx(expected)


def test_every_preset_is_finite_and_faster_than_the_one_before() -> None:
    presets = [devices.build(name, {}) for name in ("phone", "laptop", "workstation", "hospital-server")]
    assert sorted(devices.names()) == ["hospital-server", "laptop", "phone", "workstation"]
    assert [device.speed for device in presets] == sorted({device.speed for device in presets})
    assert presets[0].speed == 1.0
    for device in presets:
        assert 0 < device.uplink <= device.downlink <= 1000
        assert 0 < device.availability <= 1
        assert 0 <= device.dropout < 0.1
    assert [device.memory for device in presets] == [6.0, 16.0, 24.0, 80.0]


def test_profiles_are_dealt_in_turn_and_own_numbers_replace_theirs() -> None:
    table = ClientsTable(profile=("phone", "laptop"), speed=(7.0, 8.0, 9.0), dropout=(0.5,))
    dealt = devices_of(table, 6, 0)
    phone, laptop = devices.build("phone", {}), devices.build("laptop", {})
    assert [device.speed for device in dealt] == [7.0, 8.0, 9.0, 7.0, 8.0, 9.0]
    assert [device.uplink for device in dealt] == [phone.uplink, laptop.uplink] * 3
    assert {device.dropout for device in dealt} == {0.5}
    assert [device.memory for device in dealt] == [6.0, 16.0] * 3
    assert devices_of(ClientsTable(profile=("phone",), memory=(4.0, 8.0)), 2, 0) == [
        replace(phone, memory=m) for m in (4.0, 8.0)
    ]
    assert devices_of(ClientsTable(), 6, 0) == []
    assert devices_of(ClientsTable(rank=(2,)), 6, 0) == []
    assert devices_of(ClientsTable(uplink=(3.0,)), 2, 0) == [Device(uplink=3.0)] * 2


def test_profiles_with_shares_are_drawn_from_the_seed() -> None:
    table = ClientsTable(profile=("phone", "workstation"), shares=(3.0, 1.0))
    drawn = devices_of(table, 4000, 5)
    assert sum(device.speed == 1.0 for device in drawn) / 4000 == pytest.approx(0.75, abs=0.03)
    assert devices_of(table, 4000, 5) == drawn
    assert devices_of(table, 10, 5) == drawn[:10], "more clients do not change the first"
    assert devices_of(table, 4000, 6) != drawn


# The clock


def test_a_clock_changes_nothing_in_training() -> None:
    for name in ("fedavg", "scaffold", "fedadam", "flora"):
        plain, states, _ = run(PLAN, name)
        timed, on_clock, _ = run(replace(PLAN, simulation=simulation(SLOW, Device(speed=1.0))), name)
        assert [without_clock(record) for record in timed] == [without_clock(record) for record in plain]
        for state, with_time in zip(states, on_clock, strict=True):
            assert same(state, {group: tensors for group, tensors in with_time.items() if group != GROUP})
        assert all(not record.clock for record in plain)


def test_a_round_lasts_as_long_as_its_slowest_client() -> None:
    records, states, _ = run(replace(PLAN, simulation=simulation(SLOW)))
    total = 0.0
    for record, state in zip(records, states, strict=True):
        needs = {client: {"compute": examples_of(client) / 2, "transfer": 3.0} for client in record.sampled}
        assert record.clock["began"] == total
        assert record.clock["clients"] == {c: pytest.approx(n) for c, n in needs.items()}
        assert record.clock["seconds"] == pytest.approx(examples_of(max(record.sampled)) / 2 + 3.0)
        total += record.clock["seconds"]
        assert float(state[GROUP]["seconds"]) == total
    assert simulated_seconds([asdict(record) for record in records]) == total
    assert simulated_seconds([asdict(record) for record in run(PLAN)[0]]) is None
    assert simulated_seconds([]) is None
    json.dumps(asdict(records[0]), allow_nan=False)


def test_what_travels_counts_and_not_what_the_server_has() -> None:
    """FFA-LoRA sends the factors B only."""
    records, _, _ = run(replace(PLAN, simulation=simulation(SLOW)), "ffa-lora")
    ups = records[1].bytes_up["adapter"] / 3
    assert ups < BYTES
    transfers = [needs["transfer"] for needs in records[1].clock["clients"].values()]
    assert transfers == pytest.approx([3.0 * ups / BYTES] * 3)


# Clients that never answer


def test_a_client_that_drops_out_is_recorded_and_waited_for() -> None:
    plan = replace(PLAN, simulation=simulation(replace(SLOW, dropout=0.4)), rounds=40)
    records, _, fleet = run(plan)
    dropped = sum(len(record.refused) for record in records)
    assert dropped / (3 * 40) == pytest.approx(0.4, abs=0.12)
    trained = {info.round: set(messages) for info, messages in fleet.seen}
    for record in records:
        lost = {refusal["client"] for refusal in record.refused}
        assert {refusal["why"] for refusal in record.refused} <= {"dropped out"}
        assert trained.get(record.round, set()) == set(record.sampled) - lost, "who drops out is not trained"
        assert record.clock["lost"] == sorted(lost)
        assert record.bytes_down["adapter"] == 3 * BYTES
        assert record.bytes_up.get("adapter", 0) == (3 - len(lost)) * BYTES
        assert record.clock["seconds"] == pytest.approx(examples_of(max(record.sampled)) / 2 + 3.0)
    again, _, _ = run(plan)
    assert [r.refused for r in again] == [r.refused for r in records]
    assert [r.sampled for r in records] == [r.sampled for r in run(replace(PLAN, rounds=40))[0]], "a stream of its own"


def test_a_round_without_answers_leaves_the_model_as_it_is() -> None:
    plan = replace(PLAN, per_round=1, rounds=30, simulation=simulation(Device(speed=1.0, dropout=0.5)))
    records, states, fleet = run(plan)
    empty = [record.round for record in records if record.refused]
    assert 5 < len(empty) < 25
    for number in filter(None, empty):
        assert torch.equal(*(next(iter(states[n]["adapter"].values())) for n in (number - 1, number)))
        assert records[number].loss != records[number].loss, "NaN"
        assert records[number].clock["seconds"] > 0
    with pytest.raises(TooFewUpdates, match=r"0 usable updates, train\.min_updates = 2"):
        run(replace(plan, per_round=2, min_updates=2, simulation=simulation(Device(dropout=0.999))))
    assert len(fleet.committed) == 28


def test_a_resumed_run_ends_with_the_same_state_and_time() -> None:
    plan = replace(PLAN, rounds=6, simulation=simulation(SLOW, Device(speed=3.0, dropout=0.3)))
    records, states, _ = run(plan)
    resumed, after, _ = run(plan, resume=(3, states[2]))
    assert same(after[-1], states[-1])
    assert [without_clock(r) for r in resumed] == [without_clock(r) for r in records[3:]]
    assert [r.clock for r in resumed] == [r.clock for r in records[3:]]


def test_clients_that_sent_nothing_had_nothing_refused() -> None:
    rows = [{"samples": 2, "image": 2, "text": 2}] * 3
    record = {"sampled": [0, 1, 2], "kept": {"0": 0.25}, "refused": [{"client": 1, "why": "x"}, {"client": 2, "why": "y"}]}
    (row,) = kept_by_group([record | {"clock": {"lost": [2]}}], rows)
    assert (row["clients"], row["updates"], row["refused"]) == (2, 1, 1)
    (row,) = kept_by_group([record | {"clock": {}}], rows)
    assert (row["clients"], row["updates"], row["refused"]) == (3, 1, 2)


# The experiment file

FILE: dict[str, Any] = {"task": {"name": "shapes-qa"}, "partition": {"clients": 4}}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"clients": {"profile": "fone"}}, "clients.profile: there is no device 'fone'; did you mean 'phone'"),
        ({"clients": {"profile": ["phone", "mainframe"]}}, "clients.profile: there is no device 'mainframe'; choose one of"),
        ({"clients": {"profile": 3}}, "clients.profile: must be a list"),
        ({"clients": {"profile": ["phone"], "shares": [1, 2]}}, "clients.shares has 2 entries and clients.profile 1; give one"),
        ({"clients": {"shares": [1.0]}}, "clients.shares has 1 entries and clients.profile 0"),
        ({"clients": {"speed": [0.0]}}, "clients.speed.0: input should be greater than 0"),
        ({"clients": {"speed": [1e13]}}, "which no device reaches"),
        ({"clients": {"uplink": [-1.0]}}, "clients.uplink.0: input should be greater than 0"),
        ({"clients": {"memory": [6.0, 0.0]}}, "clients.memory.1: input should be greater than 0"),
        ({"clients": {"dropout": [1.0]}}, "clients.dropout.0: input should be less than 1"),
        ({"clients": {"availability": [0.0]}}, "clients.availability.0: input should be greater than 0"),
        ({"clients": {"availability": [1.5]}}, "clients.availability.0: input should be less than or equal to 1"),
        (
            {"clients": {"profile": "phone"}, "fleet": {"name": "flower"}},
            'clients.profile and the like simulate devices, and fleet.name = "flower" trains on real ones',
        ),
        (
            {"clients": {"dropout": [0.0, 0.1]}, "secure": {"name": "pairwise"}},
            "clients.dropout: a masked round of secure.name = 'pairwise' must not shrink to a single client",
        ),
    ],
)
def test_a_bad_table_is_refused(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(validate({**FILE, **tables}))
    assert message in str(caught.value)


def test_a_profile_may_be_one_name() -> None:
    assert validate({**FILE, "clients": {"profile": "phone"}}).clients.profile == ("phone",)
    assert (
        validate({**FILE, "clients": {"profile": "phone"}}).toml()
        == validate({**FILE, "clients": {"profile": ["phone"]}}).toml()
    )


def test_baselines_have_no_devices() -> None:
    slow = validate({**FILE, "clients": {"profile": "phone", "dropout": [0.1]}})
    fast = validate({**FILE, "clients": {"speed": [100.0]}})
    for kind in ("local", "centralised", "zero-shot"):
        assert essential(slow, kind) == essential(fast, kind) == essential(validate(FILE), kind)
    assert essential(slow, "federated") != essential(fast, "federated")


def test_the_simulation_of_an_experiment_counts_every_epoch() -> None:
    file = {**FILE, "clients": {"speed": [2.0]}, "train": {"epochs": 3}}
    made = Simulation.of(validate(file), [5, 6, 7, 8])
    assert made is not None
    assert made.examples == [15, 18, 21, 24]
    assert Simulation.of(validate(FILE), [5, 6, 7, 8]) is None


@pytest.mark.parametrize("server", ['[asynchronous]\nname = "fedbuff"\nbuffer = 1\n', ""], ids=["fedbuff", "synchronous"])
def test_a_run_shows_its_simulated_time(server: str, write_experiment: Callable[..., Path], tmp_path: Path) -> None:
    file = write_experiment("every = 1\n[clients]\nspeed = [0.01, 0.02]\n" + server, rounds=2)
    done = call("run", file, "--set", "eval.bootstrap=20", "--set", 'eval.patterns=["text"]', "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    run = RunDir(tmp_path / "run")
    ends = [record["clock"]["began"] + record["clock"]["seconds"] for record in run.rounds()]
    assert 0 < ends[0] < ends[1] == run.result()["simulated_seconds"]
    assert [point.seconds for point in curve(run)] == ends
    for end in ends:
        assert f"  {end:.0f} simulated s" in done.stderr
    assert "simulated s" in done.stdout
    assert f" {ends[1]:.0f} " in done.stdout
