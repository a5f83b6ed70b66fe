"""Algorithms under which every client trains an adapter of its own beside the global one: Ditto and FedDPA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmllm.algorithms import Algorithm, ClientInfo, LocalRule, OwnTraining, own_adapter
from fedmllm.algorithms.factors import A, B, as_fold, modules, new_lora
from fedmllm.algorithms.traffic import traffic_of
from fedmllm.config import LoraTable, ModelTable, TrainTable, validate
from fedmllm.data.prompts import Conversation
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build
from fedmllm.fleets.inprocess import _own_job
from fedmllm.models.mllm import MLLM
from fedmllm.tensors import State, Tensors, distance, scale
from fedmllm.training.cohort import Work, train_cohort
from helpers import (
    ADAPTER_INFO,
    CLIENTS,
    LR,
    a_round,
    built,
    local_sgd,
    lora_adapter,
    round_info,
    same,
    steps_of,
    target,
)
from naive_training import train_naively

SAMPLED = {0: (0, 1), 1: (1, 3), 2: (0, 3), 3: (0, 1)}
"""Who takes part in each round: everybody is absent at least once."""


def histories(algorithm: Algorithm, lr: float = LR) -> tuple[list[State], list[dict[int, State]]]:
    """The server's states and the clients' memories before the first round and after each one."""
    memories: dict[int, State] = {}
    states, kept = [algorithm.init(lora_adapter())], [dict(memories)]
    for number, sampled in SAMPLED.items():
        info = replace(round_info(number, sampled, rounds=len(SAMPLED)), lr=lr)
        updates = a_round(algorithm, states[-1], memories, info)
        states.append(algorithm.aggregate(states[-1], updates, info))
        kept.append(dict(memories))
    return states, kept


def naive_ditto(states: list[State], lam: float, lr: float) -> dict[int, Tensors]:
    """v ← v − η (∇F(v) + λ (v − w)), with ∇F(v) = v − target, one client and step at a time."""
    own: dict[int, Tensors] = {}
    for number, sampled in SAMPLED.items():
        w = states[number]["adapter"]
        for client in sampled:
            v = {name: t.double() for name, t in own.get(client, w).items()}
            for _ in range(steps_of(client)):
                for name in v:
                    gradient = v[name] - target(client, name, v[name].shape)
                    v[name] = v[name] - lr * (gradient + lam * (v[name] - w[name]))
            own[client] = v
    return own


def close(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name].double(), tensor.double(), rtol=1e-5, atol=atol)


# Ditto


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 4.0])
def test_ditto_is_its_naive_twin(lam: float) -> None:
    states, kept = histories(built("ditto", lam=lam))
    expected = naive_ditto(states, lam, LR)
    assert kept[-1].keys() == expected.keys()
    for client, own in expected.items():
        close(kept[-1][client]["own"], own)


@pytest.mark.parametrize("lam", [0.0, 1.0, 7.0])
def test_the_global_path_of_ditto_is_that_of_fedavg_whatever_lam(lam: float) -> None:
    options: dict[str, Any] = {"server_lr": 0.7, "weighting": "uniform"}
    plain, _ = histories(built("fedavg", **options))
    states, _ = histories(built("ditto", lam=lam, **options))
    assert all(same(state, expected) for state, expected in zip(states, plain, strict=True))


def test_without_lam_a_client_learns_alone() -> None:
    """From the adapter that it received first, as if there were no others."""
    states, kept = histories(built("ditto", lam=0.0))
    for client in CLIENTS:
        rounds = [number for number, sampled in SAMPLED.items() if client in sampled]
        own = states[rounds[0]]["adapter"]
        for _ in rounds:
            own = local_sgd(client, own, LocalRule()).trained
        close(kept[-1][client]["own"], own)


def test_a_large_lam_ties_the_own_adapter_to_the_global_one() -> None:
    """At η λ = 1 a step leads from anywhere to w − η ∇F, and so to w as λ → ∞."""
    away = []
    for lr in (1e-1, 1e-2, 1e-3):
        states, kept = histories(built("ditto", lam=1 / lr), lr)
        away.append(distance(kept[-1][0]["own"], states[3]["adapter"]))  # what client 0 received in round 3
    assert away[0] > 5 * away[1] > 25 * away[2] > 0


def test_absent_clients_keep_their_own_adapter_and_newcomers_have_the_global_one() -> None:
    states, kept = histories(built("ditto"))
    assert same(kept[2][0], kept[1][0]), "client 0 was absent in round 1"
    assert not same(kept[2][1], kept[1][1])
    message: State = {"adapter": states[-1]["adapter"]}
    assert own_adapter(message, kept[-1][3], lora_adapter()) is kept[-1][3]["own"]
    assert same({"adapter": own_adapter(message, {}, lora_adapter())}, message)


@pytest.mark.parametrize("name", ["ditto", "feddpa"])
def test_the_own_adapter_does_not_travel(name: str) -> None:
    assert traffic_of(built(name)) == {"down": ["adapter"], "up": ["adapter"]}
    assert built(name).personal


@pytest.mark.parametrize(("name", "rounds"), [("ditto", 1), ("feddpa", 2)])
def test_wrappers_leave_the_own_adapter_alone(name: str, rounds: int) -> None:
    """A regularisation ties the global adapter and a compression packs it; the first training of the own one stays the same."""
    expected = histories(built(name))[1][rounds][1]["own"]
    for wrapped in (built(name, "fedprox"), built(name, compression="int8"), built(name, compression="top-k")):
        _, kept = histories(wrapped)
        assert same({"own": kept[rounds][1]["own"]}, {"own": expected})
        assert all("own" in kept[-1][client] for client in CLIENTS)


# FedDPA


def test_the_global_path_of_feddpa_is_that_of_fedavg_with_equal_weights() -> None:
    plain, _ = histories(built("fedavg", weighting="uniform"))
    for share in (0.2, 0.5, 1.0):
        states, _ = histories(built("feddpa", share=share))
        assert all(same(state, expected) for state, expected in zip(states, plain, strict=True))


def test_local_adapters_begin_in_the_second_round_as_lora_does() -> None:
    algorithm, received = built("feddpa"), {"adapter": lora_adapter()}
    first, second = (round_info(number, client=ClientInfo(1, 0.0)) for number in (0, 1))
    assert algorithm.own(received, {}, first) is None
    own = algorithm.own(received, {}, second)
    assert own is not None
    assert own.beside is received["adapter"]
    assert own.share == 0.5
    assert not any(bool(t.any()) for name, t in own.start.items() if name.endswith(B))
    assert all(0 < float(t.abs().max()) <= 3**-0.5 for name, t in own.start.items() if name.endswith(A))
    other = algorithm.own(received, {}, replace(second, client=ClientInfo(2, 0.0)))
    assert other is not None
    assert not same({"a": other.start}, {"a": own.start})
    memory = {"own": {name: t + 1 for name, t in received["adapter"].items()}}
    later = algorithm.own(received, memory, second)
    assert later is not None
    assert later.start is memory["own"]
    _, kept = histories(algorithm)
    assert kept[1] == {0: {}, 1: {}}


def test_what_is_tested_is_the_weighted_sum_of_both_adapters() -> None:
    """a s B_k A_k + (1 − a) s B A, multiplied out; and with the global adapter in place of an own one, that adapter."""
    shapes = {name: torch.ones_like(tensor) for name, tensor in lora_adapter().items()}
    generator = torch.Generator().manual_seed(3)
    shared, own = ({n: torch.randn(t.shape, generator=generator) for n, t in shapes.items()} for _ in range(2))
    s = ADAPTER_INFO.scale(2)
    for share in (0.25, 0.5, 1.0):
        for local in (own, shared):
            model = built("feddpa", share=share).tested({"adapter": shared}, local, round_info())
            for m in modules(shared):
                fold = model["fold"][m + ".fold_B"] @ model["fold"][m + ".fold_A"]
                total = s * model["adapter"][m + B] @ model["adapter"][m + A] + fold
                expected = share * s * local[m + B] @ local[m + A] + (1 - share) * s * shared[m + B] @ shared[m + A]
                torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    alone = built("feddpa", share=1.0).tested({"adapter": shared}, own, round_info())
    assert same({"adapter": alone["adapter"]}, {"adapter": own})
    assert not any(bool(t.any()) for n, t in alone["fold"].items() if n.endswith("fold_B"))


def test_local_training_beside_the_global_adapter_is_that_of_the_dense_sum(tiny: Path) -> None:
    """The twin has (1 − a) s B A in its dense base weights. It trains √a A_k and √a B_k, which at a times the learning rate
    move as A_k and B_k do under plain SGD."""
    model = MLLM.load(ModelTable(name=str(tiny), lora=LoraTable(rank=2), precision="fp32"), seed=0)
    talks = [Conversation(f"{color} or not?", color, image=False) for color in ("red", "green", "blue")]
    samples = model.encode(talks, [None] * 3, 300)
    steps = [[[samples[0], samples[1]]], [[samples[2]]], [[samples[1]]]]
    shared, own = ({n: t + 0.1 for n, t in new_lora(model.adapter.get(), seed).items()} for seed in (1, 2))
    share, table = 0.3, TrainTable(optimizer="sgd", lr=0.5, clip=0.0, weight_decay=0.0)
    model.adapter.set_fold(as_fold(shared, 1 - share, model.info))
    (result,) = train_cohort(model, [Work(steps, own, LocalRule(), 0, share=share)], table)
    dense = {m + ".fold": (1 - share) * model.info.scale(2) * shared[m + B] @ shared[m + A] for m in modules(shared)}
    model.adapter.set_fold(dense)
    twin = train_naively(
        model, Work(steps, scale(own, share**0.5), LocalRule(), 0), table.model_copy(update={"lr": 0.5 * share})
    )
    expected = scale(twin.trained, share**-0.5)
    assert distance(result.trained, own) > 1e-2
    assert distance(result.trained, expected) < 1e-4 * distance(result.trained, own)
    model.adapter.set_fold({})
    (alone,) = train_cohort(model, [Work(steps, own, LocalRule(), 0)], table)
    assert distance(alone.trained, result.trained) > 1e-2, "neither the share nor the global adapter matters"


def test_at_a_share_of_1_the_global_adapter_is_not_there() -> None:
    """It is no fold either, which is what an adapter with a share of 0 would be taken for."""
    start, shared = new_lora(lora_adapter(), 1), lora_adapter()
    work = Work([], shared, LocalRule(), 0)
    added, share, own = _own_job(OwnTraining(start, share=1.0, beside=shared), work, {"adapter": shared})
    assert (added, share, own.share) == ({}, 0.0, 1.0)
    assert own.received is start
    added, share, _ = _own_job(OwnTraining(start, share=0.25, beside=shared), work, {"adapter": shared})
    assert added is shared
    assert share == 0.75


# What is combined


BASE: dict[str, Any] = {"task": {"name": "pocket-memes"}, "model": {"name": "pocket"}, "train": {"clients_per_round": 4}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("ditto", {"secure": {"name": "pairwise"}}, "sends every client's own adapter to be tested"),
    ("ditto", {"privacy": {"name": "user-level", "noise": 1.0, "delta": 1e-3}}, "leaves part of every model with its client"),
    ("feddpa", {"asynchronous": {"name": "fedbuff", "buffer": 2}, "clients": {"profile": ["phone"]}}, "has one model for all"),
    ("ditto", {"clients": {"rank": [2, 4]}}, "'ditto' cannot average adapters of ranks"),
    ("feddpa", {"clients": {"rank": [2, 4]}}, "'feddpa' cannot average adapters of ranks"),
    ("feddpa", {"model": {"name": "pocket", "adapter": {"kind": "dora"}}}, "'feddpa' works on LoRA's factors A and B alone"),
    ("ditto", {"algorithm": {"lam": -1.0}}, "lam = -1.0 must not be negative"),
    ("feddpa", {"algorithm": {"share": 0.0}}, "share = 0.0 must be above 0 and at most 1"),
    ("feddpa", {"algorithm": {"share": 1.1}}, "share = 1.1 must be above 0 and at most 1"),
]


@pytest.mark.parametrize(("name", "tables", "why"), REFUSED, ids=[f"{name}-{tables}" for name, tables, _ in REFUSED])
def test_what_cannot_be_combined_is_refused(name: str, tables: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        build(validate({**BASE, **tables, "algorithm": {"name": name, **tables.get("algorithm", {})}}))


@pytest.mark.parametrize("name", ["ditto", "feddpa"])
def test_the_global_adapter_may_be_a_robust_mean(name: str) -> None:
    """What travels is a whole adapter, unlike that of `fedsa-lora`."""
    tables = {"algorithm": {"name": name}, "robust": {"name": "median"}, "compression": {"name": "int8"}}
    assert build(validate({**BASE, **tables})).robust is not None
