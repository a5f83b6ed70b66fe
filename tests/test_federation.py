from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from fedmllm.algorithms import Update, algorithms
from fedmllm.algorithms.base import groups
from fedmllm.algorithms.fedavg import fedavg
from fedmllm.config import TrainTable
from fedmllm.federation import FederationPlan, RoundRecord, TooFewUpdates, each_alone, federate, learning_rate, sample_clients
from fedmllm.storage.state_file import load_state, save_state
from fedmllm.tensors import State, nbytes
from helpers import ADAPTER_INFO, IN_TURN, FakeFleet, built, lora_adapter, same, update

PLAN = FederationPlan(tuple(range(8)), 3, 4, 0.1, "cosine", 1, seed=0, adapter=ADAPTER_INFO)
ADAPTER = lora_adapter()
A_NAME = min(ADAPTER)
BYTES = nbytes(ADAPTER)

DIVERGED = f"; its training diverged: lower train.lr, which was {PLAN.lr:g}"


def run(
    fleet: FakeFleet, plan: FederationPlan = PLAN, resume: tuple[int, State] | None = None
) -> list[tuple[RoundRecord, State]]:
    return list(federate(fleet.algorithm, fleet, plan, ADAPTER, resume))


# Which clients


def test_a_sample_of_clients_is_drawn_without_replacement_and_sorted() -> None:
    plan = replace(PLAN, clients=(3, 20, 100, 7, 8), per_round=4)
    for number in range(30):
        sampled = sample_clients(plan, number)
        assert list(sampled) == sorted(set(sampled))
        assert len(sampled) == 4
        assert set(sampled) <= set(plan.clients)
    assert sample_clients(replace(PLAN, per_round=8), 5) == PLAN.clients


def test_sampling_depends_on_the_seed_and_the_round_only() -> None:
    expected = [sample_clients(PLAN, number) for number in range(20)]
    others = replace(PLAN, rounds=99, lr=1.0, schedule="constant", min_updates=3)
    assert [sample_clients(others, number) for number in reversed(range(20))] == expected[::-1]
    assert len(set(expected)) > 10
    assert [sample_clients(replace(PLAN, seed=1), number) for number in range(20)] != expected


def test_every_client_is_as_likely_as_every_other() -> None:
    counts = Counter(client for number in range(4000) for client in sample_clients(PLAN, number))
    assert all(counts[client] / 4000 == pytest.approx(3 / 8, abs=0.03) for client in range(8))


def test_a_plan_asks_for_no_more_clients_than_there_are() -> None:
    plan = FederationPlan.of(TrainTable(rounds=7, clients_per_round=4, min_updates=3, lr=0.5), [5, 6], seed=9)
    assert plan == FederationPlan((5, 6), 2, 7, 0.5, "cosine", 2, 9)


# The learning rate


def test_the_learning_rate_falls_as_half_a_cosine() -> None:
    # 0.1 · ½(1 + cos(π t / 4)) for t = 0 … 3
    expected = [0.1, 0.05 * (1 + math.sqrt(0.5)), 0.05, 0.05 * (1 - math.sqrt(0.5))]
    assert [learning_rate(PLAN, number) for number in range(4)] == pytest.approx(expected)
    assert [learning_rate(replace(PLAN, schedule="constant"), number) for number in range(4)] == [0.1] * 4


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_only_the_first_round_has_a_factor(schedule: str) -> None:
    plain = FederationPlan.of(TrainTable(rounds=4, lr=0.1, schedule=schedule), [0], 0)
    warm = FederationPlan.of(TrainTable(rounds=4, lr=0.1, schedule=schedule, first_round_factor=4.0), [0], 0)
    rates, plain_rates = ([learning_rate(plan, number) for number in range(4)] for plan in (warm, plain))
    assert rates == [4 * plain_rates[0], *plain_rates[1:]]
    assert warm.info(0, [0]).lr == pytest.approx(0.4)


# The rounds


def test_a_fleet_is_told_the_round_the_clients_the_state_and_the_rate() -> None:
    fleet = FakeFleet(fedavg())
    results = run(fleet)
    assert [record.round for record, _ in results] == [0, 1, 2, 3]
    states = [{"adapter": ADAPTER}, *(state for _, state in results)]
    for number, (info, messages) in enumerate(fleet.seen):
        assert (info.round, info.rounds, info.clients, info.seed) == (number, 4, 8, 0)
        assert info.sampled == sample_clients(PLAN, number) == tuple(results[number][0].sampled)
        assert info.lr == results[number][0].lr == learning_rate(PLAN, number)
        assert messages.keys() == set(info.sampled)
        assert all(same(message, states[number]) for message in messages.values())
    assert fleet.committed == [0, 1]


def test_a_round_is_committed_when_its_driver_has_come_back_three_times() -> None:
    fleet = FakeFleet(fedavg())
    rounds = federate(fleet.algorithm, fleet, PLAN, ADAPTER)
    for expected in ([], [], [], [0]):
        next(rounds)
        assert fleet.committed == expected


def test_a_record_adds_up_what_the_clients_did() -> None:
    fleet = FakeFleet(fedavg(), lambda _, updates: [replace(u, metrics={"loss": float(u.client)}) for u in updates])
    record = run(fleet, replace(PLAN, clients=(0, 1, 2)))[0][0]
    # Toy client k has 10 (k + 1) examples and 2 + k mod 3 steps; its loss is set to k.
    assert (record.examples, record.steps) == (60, 9)
    assert record.loss == pytest.approx((10 * 0 + 20 * 1 + 30 * 2) / 60)
    assert record.refused == []


def test_bytes_are_counted_by_group_from_what_travels() -> None:
    plain = fedavg()
    extra = replace(
        plain,
        init=lambda adapter: {**plain.init(adapter), "control": {"c": torch.zeros(5)}, "private": {"p": torch.zeros(9)}},
        finish=lambda *args: ({**plain.finish(*args)[0], "control": {"c": torch.ones(5)}}, {}),
        uploads=groups("adapter", "control"),
        message=groups("adapter", "control"),
    )
    for record, _ in run(FakeFleet(extra)):
        assert record.bytes_down == {"adapter": 3 * BYTES, "control": 3 * 20}
        assert record.bytes_up == {"adapter": 3 * BYTES, "control": 3 * 20}


def test_bytes_are_counted_by_the_part_of_the_model() -> None:
    """By the tensors' names in every group; what secure aggregation reports belongs to no part."""
    algorithm = fedavg()
    sizes = {name: tensor.nbytes for name, tensor in algorithm.init(ADAPTER)["adapter"].items()}
    first, others = min(sizes), sum(sizes.values()) - sizes[min(sizes)]
    info = replace(PLAN.adapter, part=lambda name: "projector" if name == first else "text")
    expected = {"projector": 3 * sizes[first], "text": 3 * others}
    for record, _ in run(FakeFleet(algorithm), replace(PLAN, adapter=info)):
        assert record.parts_down == record.parts_up == expected
    masked = FakeFleet(algorithm, lambda number, updates: [replace(u, travelled=({"m": 7}, {"m": 9})) for u in updates])
    for record, _ in run(masked, replace(PLAN, adapter=info)):
        assert (record.parts_down, record.parts_up) == ({"other": 3 * 7}, {"other": 3 * 9})


# Updates that cannot be used


def spoilt(change: Callable[[Update], Update]) -> Callable[[int, list[Update]], list[Update]]:
    """A fleet whose second client goes wrong in round 1, and whose updates arrive backwards."""
    return lambda number, updates: updates if number != 1 else [updates[2], change(updates[1]), updates[0]]


def with_tensor(name: str, tensor: torch.Tensor | None) -> Callable[[Update], Update]:
    def change(one: Update) -> Update:
        adapter = {**one.groups["adapter"], name: tensor}
        return replace(one, groups={"adapter": {n: t for n, t in adapter.items() if t is not None}})

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (with_tensor(A_NAME, torch.full((2, 3), math.nan)), f"NaN or infinity in '{A_NAME}'{DIVERGED}"),
        (with_tensor(A_NAME, torch.full((2, 3), -math.inf)), f"NaN or infinity in '{A_NAME}'{DIVERGED}"),
        (lambda one: replace(one, metrics={"loss": math.nan}), f"NaN or infinity in the training loss{DIVERGED}"),
        (lambda one: replace(one, metrics={"loss": math.inf}), f"NaN or infinity in the training loss{DIVERGED}"),
        (lambda one: replace(one, problem="NaN or infinity in the update"), f"NaN or infinity in the update{DIVERGED}"),
        (with_tensor(A_NAME, torch.ones(3, 2)), f"shape (3, 2) of '{A_NAME}' is not (2, 3)"),
        (with_tensor(A_NAME, torch.ones(1)), f"shape (1,) of '{A_NAME}' is not (2, 3)"),
        (with_tensor(A_NAME, torch.ones(2, 3, dtype=torch.float64)),
         f"dtype torch.float64 of '{A_NAME}' is not torch.float32"),
        (with_tensor(A_NAME, None), f"missing tensor '{A_NAME}'"),
        (with_tensor("other", torch.ones(1)), "unknown tensor 'other'"),
        (lambda one: replace(one, groups={}), "groups [] instead of ['adapter']"),
        (lambda one: replace(one, groups={**one.groups, "m": {}}), "groups ['adapter', 'm'] instead of ['adapter']"),
        (lambda one: replace(one, examples=0), "no examples"),
        (lambda one: replace(one, examples=-5), "no examples"),
        (lambda one: replace(one, steps=0), "no examples"),
    ],
)  # fmt: skip
def test_an_update_that_cannot_be_used_is_named_and_the_round_goes_on(change: Callable[[Update], Update], why: str) -> None:
    results = run(FakeFleet(fedavg(), spoilt(change)))
    sampled = sample_clients(PLAN, 1)
    assert [record.refused for record, _ in results] == [[], [{"client": sampled[1], "why": why}], [], []]
    without = run(FakeFleet(fedavg(), lambda number, updates: updates if number != 1 else [updates[0], updates[2]]))
    assert same(results[1][1], without[1][1])
    assert results[1][0].examples == without[1][0].examples == 10 * (sampled[0] + sampled[2] + 2)
    assert results[1][0].loss == without[1][0].loss


def test_a_second_update_of_a_client_is_refused() -> None:
    results = run(FakeFleet(fedavg(), lambda number, updates: [*updates, updates[0]]))
    for record, _ in results:
        assert record.refused == [{"client": record.sampled[0], "why": "a second update in the same round"}]
        assert record.bytes_up == {"adapter": 4 * BYTES}, "what was refused has travelled all the same"
    assert same(results[-1][1], run(FakeFleet(fedavg()))[-1][1])


def test_a_good_update_after_a_bad_one_of_the_same_client_is_used() -> None:
    results = run(FakeFleet(fedavg(), lambda number, updates: [replace(updates[0], examples=0), *updates]))
    assert [r["why"] for record, _ in results for r in record.refused] == ["no examples"] * 4
    assert same(results[-1][1], run(FakeFleet(fedavg()))[-1][1])


def test_an_update_that_nobody_asked_for_is_refused() -> None:
    results = run(FakeFleet(fedavg(), lambda number, updates: [*updates, update(99, ADAPTER, 1000)]))
    assert [record.refused for record, _ in results] == [[{"client": 99, "why": "not sampled in this round"}]] * 4
    assert same(results[-1][1], run(FakeFleet(fedavg()))[-1][1])


def test_too_few_usable_updates_end_the_run_with_the_reasons() -> None:
    fleet = FakeFleet(fedavg(), spoilt(lambda one: replace(one, examples=0)))
    rounds = federate(fleet.algorithm, fleet, replace(PLAN, min_updates=3), ADAPTER)
    next(rounds)
    client = sample_clients(PLAN, 1)[1]
    with pytest.raises(TooFewUpdates) as failed:
        next(rounds)
    assert str(failed.value) == f"round 1: 2 usable updates, train.min_updates = 3 (client {client}: no examples)"


def test_a_diverged_run_says_which_rate_to_lower_and_what_it_was() -> None:
    fleet = FakeFleet(fedavg(), lambda number, updates: [replace(u, metrics={"loss": math.nan}) for u in updates])
    with pytest.raises(
        TooFewUpdates, match=r"client 5: NaN or infinity in the training loss; .* lower train\.lr, which was 0\.1"
    ):
        list(federate(fleet.algorithm, fleet, PLAN, ADAPTER))


def test_no_answer_at_all_ends_the_run() -> None:
    with pytest.raises(TooFewUpdates, match=r"round 0: 0 usable updates, train\.min_updates = 1 \(no client answered\)"):
        run(FakeFleet(fedavg(), lambda number, updates: []))


# Going on


@pytest.mark.parametrize("parts", IN_TURN, ids="-".join)
def test_resuming_is_the_same_as_never_stopping(tmp_path: Path, parts: tuple[str, str, str]) -> None:
    whole = run(FakeFleet(built(*parts)))
    for done in (1, 2, 3):
        fleet = FakeFleet(built(*parts))
        first = list(islice(federate(fleet.algorithm, fleet, PLAN, ADAPTER), done))
        save_state(tmp_path / "server", first[-1][1])
        second = FakeFleet(built(*parts))
        second.memory = fleet.memory
        rest = run(second, resume=(done, load_state(tmp_path / "server")[0]))
        assert [replace(r, seconds=0) for r, _ in first + rest] == [replace(r, seconds=0) for r, _ in whole]
        assert all(same(a, b) for (_, a), (_, b) in zip(first + rest, whole, strict=True))


def test_a_finished_run_has_no_rounds_left() -> None:
    assert run(FakeFleet(algorithms.build("fedavg", {})), resume=(4, {"adapter": ADAPTER})) == []


# Unequal ranks


def test_each_client_is_sent_its_own_rank_and_bytes_are_what_was_sent() -> None:
    fleet = FakeFleet(algorithms.build("hetlora", {}))
    plan = replace(PLAN, clients=(0, 1, 2), ranks={0: 1, 1: 2, 2: 1})
    for record, _ in run(fleet, plan):
        # A row of A and a column of B: 3 + 4 numbers of 4 bytes, in 6 modules.
        one = 6 * (3 + 4) * 4
        assert record.bytes_down == record.bytes_up == {"adapter": (1 + 2 + 1) * one}
    info, messages = fleet.seen[0]
    assert info.ranks == plan.ranks
    assert [messages[c]["adapter"][A_NAME].shape for c in range(3)] == [(1, 3), (2, 3), (1, 3)]


def test_an_update_of_another_rank_than_the_clients_is_refused() -> None:
    plan = replace(PLAN, clients=(0, 1, 2), ranks={0: 1, 1: 2, 2: 2})
    fleet = FakeFleet(algorithms.build("hetlora", {}), lambda _, updates: [replace(updates[0], client=1), *updates[1:]])
    record = run(fleet, plan)[0][0]
    assert [r["why"] for r in record.refused] == [f"shape (1, 3) of '{A_NAME}' is not (2, 3)"]


# Each alone


def test_clients_side_by_side_are_as_many_federations_of_one() -> None:
    starts = {client: {n: t + client for n, t in ADAPTER.items()} for client in (2, 5, 7)}
    fleet = FakeFleet(fedavg())
    together = list(each_alone(fedavg(), fleet, PLAN, starts))
    assert [info.sampled for info, _ in fleet.seen] == [(2, 5, 7)] * 4
    for client, start in starts.items():
        alone = federate(fedavg(), FakeFleet(fedavg()), replace(PLAN, clients=(client,), per_round=1), start)
        for by_client, (record, state) in zip(together, alone, strict=True):
            own_record, own_state = by_client[client]
            assert replace(own_record, seconds=0) == replace(record, seconds=0)
            assert same(own_state, state)


def test_a_client_alone_that_brings_nothing_usable_ends_it() -> None:
    fleet = FakeFleet(fedavg(), lambda number, updates: [u for u in updates if number < 2 or u.client != 5])
    rounds = each_alone(fedavg(), fleet, PLAN, {2: ADAPTER, 5: ADAPTER})
    assert [by_client.keys() for by_client in islice(rounds, 2)] == [{2, 5}] * 2
    with pytest.raises(TooFewUpdates, match=r"round 2: .*\(no client answered\)"):
        next(rounds)
