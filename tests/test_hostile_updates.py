"""Attacks replayed: whatever one client sends, its reply is refused and named, and the round is that of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedmllm.algorithms import Algorithm, Update, algorithms
from fedmllm.algorithms.fedavg import fedavg
from fedmllm.algorithms.screening import change_norms, screen
from fedmllm.algorithms.toy_federation import train_clients
from fedmllm.config import TrainTable
from fedmllm.federation import FederationPlan, RoundRecord, federate
from fedmllm.tensors import State, distance
from helpers import (
    ADAPTER_INFO,
    COMBINATIONS,
    FakeFleet,
    built,
    examples_of,
    lora_adapter,
    round_info,
    same,
    tensors,
    update,
)
from helpers import (
    a_round as train_round,
)

CLIENTS = range(5)
PLAN = FederationPlan(
    CLIENTS, 5, 4, 0.1, "cosine", 1, seed=0, adapter=ADAPTER_INFO, declared=[examples_of(client) for client in CLIENTS]
)
LIAR = 3
Attack = Callable[[Update], Update]
PARTS = [parts for parts in COMBINATIONS if parts[1] == "none"]


def rounds_of(
    algorithm: Algorithm, attack: Attack | None, plan: FederationPlan = PLAN, liars: Sequence[int] = (LIAR,)
) -> list[tuple[RoundRecord, State]]:
    """The rounds of toy clients of whom `liars` send `attack(update)`, or nothing at all."""

    def alter(number: int, updates: list[Update]) -> list[Update]:
        if attack is None:
            return [u for u in updates if u.client not in liars]
        return [attack(u) if u.client in liars else u for u in updates]

    return list(federate(algorithm, FakeFleet(algorithm, alter), plan, lora_adapter()))


def altered(change: Callable[[torch.Tensor], torch.Tensor], *names: str) -> Attack:
    """`change` applied to all numbers of the groups of these names."""

    def attack(original: Update) -> Update:
        groups = {
            group: {n: change(t) if group in names and t.is_floating_point() else t for n, t in named.items()}
            for group, named in original.groups.items()
        }
        return replace(original, groups=groups)

    return attack


ADAPTER = ("adapter", "step", "values")  # the last two: compressed by int8 and by top-k
ATTACKS: dict[str, Attack] = {
    "scaled": altered(lambda t: t * 1e6, *ADAPTER),
    "huge": altered(lambda t: torch.full_like(t, 3e38), *ADAPTER),
    "opposite": altered(lambda t: torch.full_like(t, -1e20), *ADAPTER),
    "heavy": lambda original: replace(altered(torch.zeros_like, *ADAPTER)(original), examples=10**18),
}


# One update


@pytest.mark.parametrize("parts", PARTS, ids="-".join)
def test_every_attack_is_found_under_every_algorithm(parts: tuple[str, str, str]) -> None:
    algorithm, info = built(*parts), round_info(sampled=CLIENTS)
    state = algorithm.init(lora_adapter())
    honest = train_round(algorithm, state, {}, info)
    assert screen(honest, algorithm, state, info, 100.0, PLAN.declared) == (honest, [])
    for name, attack in ATTACKS.items():
        updates = [attack(u) if u.client == LIAR else u for u in honest]
        restored = [[algorithm.restored(u, state, info).groups for u in some] for some in (updates, honest)]
        if name != "heavy" and all(same(a, b) for a, b in zip(*restored, strict=True)):
            assert parts[0] == "fed-sb", "only there is the change 0 in the first round, whatever int8 and top-k multiply it by"
            continue
        valid, refused = screen(updates, algorithm, state, info, 100.0, PLAN.declared)
        assert [row["client"] for row in refused] == [LIAR], name
        assert valid == [u for u in honest if u.client != LIAR], name


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("name", ["fedavg", "fedadam", "fednova"])
def test_the_rounds_are_those_of_the_others(name: str, attack: Attack) -> None:
    attacked, without = rounds_of(built(name), attack), rounds_of(built(name), None)
    for (record, state), (_, expected) in zip(attacked, without, strict=True):
        assert [refusal["client"] for refusal in record.refused] == [LIAR]
        assert same(state, expected)


@pytest.mark.parametrize("name", algorithms.names())
def test_honest_clients_are_never_refused(name: str) -> None:
    plan = replace(PLAN, clients=range(8), per_round=4, rounds=10, declared=[examples_of(client) for client in range(8)])
    assert [record.refused for record, _ in rounds_of(built(name), lambda u: u, plan)] == [[]] * 10


@pytest.mark.parametrize("name", ["hetlora", "flexlora", "fedmomentum", "flora", "fedilora"])
def test_unequal_ranks_are_compared_too(name: str) -> None:
    plan = replace(PLAN, ranks={client: 1 + client % 2 for client in CLIENTS})
    assert all(not record.refused for record, _ in rounds_of(built(name), lambda u: u, plan))
    attacked, without = (rounds_of(built(name), attack, plan) for attack in (ATTACKS["scaled"], None))
    assert same(attacked[-1][1], without[-1][1])


def test_a_hostile_control_variate_is_refused() -> None:
    (record, _), *_ = rounds_of(built("scaffold"), altered(lambda t: t * 1e6, "control"))
    (refusal,) = record.refused
    assert refusal["client"] == LIAR
    assert "its change of the adapter's 'control' has norm " in str(refusal["why"])


def test_the_refusal_says_how_long_the_update_was() -> None:
    updates = [update(client, tensors(w=[3.0 * size, 4.0 * size]), 9) for client, size in enumerate((1, 2, 1000))]
    state = {"adapter": tensors(w=[0.0, 0.0])}
    valid, refused = screen(updates, fedavg(), state, round_info(sampled=(0, 1, 2)), 100.0)
    assert [u.client for u in valid] == [0, 1]
    why = "its change of the adapter has norm 5e+03, more than train.max_norm_ratio = 100 times the round's median, 10"
    assert refused == [{"client": 2, "why": why}]


@pytest.mark.parametrize(
    ("lengths", "ratio", "refused"),
    [
        ([1.0, 1e6], 100.0, []),  # of two, nobody knows which is wrong
        ([1e6], 100.0, []),
        ([1.0, 1.0, 1e6], 100.0, [2]),
        ([1.0, 1.0, 1e6], 0.0, []),  # off
        ([1.0, 1.0, 99.0], 100.0, []),
        ([2.0, 2.0, 201.0], 100.0, [2]),
        ([2.0, 2.0, 30.0], 10.0, [2]),
        ([0.0, 0.0, 1.0], 100.0, []),  # a median of 0
        ([0.0, 0.0, 0.0, 0.9, 1.0], 100.0, []),
        ([0.0, 0.0, 0.0], 100.0, []),
        ([1e-9, 1e-9, 1e-9, 0.5], 100.0, []),
        ([0.0, 0.0, 1e6], 100.0, [2]),
        ([1.0, 1e6, 1.0, 1e6, 1.0], 100.0, [1, 3]),
        ([1.0, 1e6, 1e6], 100.0, []),  # most of them say so
    ],
)
def test_which_lengths_are_refused(lengths: list[float], ratio: float, refused: list[int]) -> None:
    updates = [update(client, tensors(w=[length]), 9) for client, length in enumerate(lengths)]
    info = round_info(sampled=range(len(lengths)))
    rows = screen(updates, fedavg(), {"adapter": tensors(w=[0.0])}, info, ratio)[1]
    assert [row["client"] for row in rows] == refused


def test_a_change_no_longer_than_the_adapter_is_never_refused() -> None:
    state = {"adapter": tensors(w=[300.0, 400.0])}
    updates = [update(client, tensors(w=[300.0, 400.0 + change]), 9) for client, change in enumerate((1e-3, 1e-3, 500.0))]
    assert not screen(updates, fedavg(), state, round_info(sampled=(0, 1, 2)), 100.0)[1]


def test_the_length_is_that_of_the_difference_from_what_was_sent() -> None:
    for parts in PARTS:
        algorithm, info = built(*parts), round_info(sampled=(0, 1, 2))
        if built(*parts[:2]).packed:
            continue  # lora-a2 has no plain updates to compare with: see test_lora_a2.py
        state = algorithm.init(lora_adapter())
        messages = {client: algorithm.message(state, client, info) for client in info.sampled}
        plain = train_clients(built(*parts[:2]), messages, {}, info, lora_adapter())
        for sent, original in zip(train_clients(algorithm, messages, {}, info, lora_adapter()), plain, strict=True):
            adapter = original.groups["adapter"]
            expected = distance(adapter, {name: messages[sent.client]["adapter"][name] for name in adapter})
            tolerance = 0.5 if parts[2] == "top-k" else 0.02 if parts[2] == "int8" else 1e-6
            assert change_norms(sent, algorithm, state, info)["adapter"] == pytest.approx(expected, rel=tolerance)


def test_the_plan_takes_the_bound_from_the_experiment() -> None:
    for ratio in (0.0, 7.0, 100.0):
        assert FederationPlan.of(TrainTable(max_norm_ratio=ratio), [0], 0).max_norm_ratio == ratio
    assert TrainTable().max_norm_ratio == 100


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"examples": 10**18}, "trained on 1000000000000000000 samples, and has 40 in a round"),
        ({"examples": 41}, "trained on 41 samples, and has 40 in a round"),
        ({"examples": 10**400}, "a number of samples or steps that no client has"),
        ({"examples": 10**5000}, "a number of samples or steps that no client has"),
        ({"steps": 10**400}, "a number of samples or steps that no client has"),
        ({"steps": 41}, "41 steps on 40 samples"),
        ({"examples": -(10**400)}, "no examples"),
        ({"metrics": {"loss": 10**400}}, "NaN or infinity in the training loss"),
        ({"metrics": {"loss": -1e300}}, "NaN or infinity in the training loss"),
        ({"metrics": {"loss": 1.0, "padding": math.nan}}, "padding = nan is not a share"),
        ({"metrics": {"loss": 1.0, "padding": 1e300}}, "padding = 1e+300 is not a share"),
        ({"metrics": {"loss": 1.0, "padding": -0.1}}, "padding = -0.1 is not a share"),
        ({"problem": "\x1b[31m" + "x" * 10_000_000}, r"\x1b[31m" + "x" * 495 + "…"),
        ({"groups": {"x" * 9999: {}}}, "groups ['" + "x" * 491 + "…"),
    ],
    ids=range(14),
)  # fmt: skip
def test_numbers_and_texts_beyond_reason_are_refused(change: Mapping[str, Any], why: str) -> None:
    attacked, without = rounds_of(fedavg(), lambda u: replace(u, **change)), rounds_of(fedavg(), None)
    for (record, state), (other, expected) in zip(attacked, without, strict=True):
        (refusal,) = record.refused
        assert refusal["client"] == LIAR
        assert str(refusal["why"]).partition("; its training diverged")[0] == why
        assert same(state, expected)
        assert (record.examples, record.steps, record.loss, record.padding) == (
            other.examples, other.steps, other.loss, other.padding
        )  # fmt: skip
