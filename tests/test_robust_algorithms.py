"""Robust aggregation around the algorithms, compressed or not, and in a run that is resumed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

from fedmllm.algorithms import Algorithm, RoundInfo, Update, algorithms
from fedmllm.federation import FederationPlan, federate
from fedmllm.tensors import State, flatten, unflatten
from fedmllm.testing import check_robust
from helpers import ADAPTER_INFO, CLIENTS, FakeFleet, a_round, built, lora_adapter, round_info, rounds_of, same
from robust_rounds import METHODS, robust

AVERAGING = [n for n in algorithms.names() if built(n).averages and not built(n).personal]


@cache
def first_round(name: str, compression: str) -> tuple[Algorithm, State, list[Update], RoundInfo]:
    """The algorithm, its state, and the updates of seven clients, computed once for all methods."""
    options = {} if name in ("feddyn", "scaffold") else {"weighting": "uniform"}
    algorithm, info = built(name, compression=compression, **options), round_info(1, sampled=range(7))
    state = algorithm.init(lora_adapter())
    return algorithm, state, a_round(algorithm, state, {}, info), info


@pytest.mark.parametrize("compression", ["none", "int8", "top-k"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", AVERAGING)
def test_around_every_algorithm_that_averages(name: str, method: str, compression: str) -> None:
    """A method that excludes nothing gives the algorithm's own aggregate; any gives one without a hostile client."""
    algorithm, state, updates, info = first_round(name, compression)
    neutral = {"norm-clip": {"bound": 1e9, "factor": 1e9}, "centered-clip": {"bound": 1e9}, "trimmed-mean": {"share": 0.0}}
    if method in neutral:
        combined = robust(method, **neutral[method]).combine(updates, algorithm, state, info)
        after, plain = (flatten(algorithm.aggregate(state, us, info)) for us in (combined.updates, updates))
        assert all(torch.allclose(after[n], plain[n], rtol=1e-5, atol=1e-6) for n in plain)
    hostile = {g: {n: t * 1e6 if t.is_floating_point() else t for n, t in ts.items()} for g, ts in updates[3].groups.items()}
    attacked = [replace(u, groups=hostile) if u.client == 3 else u for u in updates]
    combined = robust(method).combine(attacked, algorithm, state, info)
    assert [u.client for u in combined.updates] == list(info.sampled) == list(combined.kept)
    after = algorithm.aggregate(state, combined.updates, info)
    assert max(float(t.abs().max()) for t in after["adapter"].values()) < 1e3


@pytest.mark.parametrize("name", algorithms.names())
def test_norm_clip_works_around_every_algorithm(name: str) -> None:
    unequal = {client: 1 + client % 2 for client in CLIENTS}
    algorithm = built(name)
    info = round_info(1, CLIENTS, ranks=unequal if algorithm.unequal_ranks else None)
    # The first round of `fed-sb` trains nothing.
    state = next(rounds_of(algorithm))[2] if algorithm.needs_core else algorithm.init(lora_adapter())
    updates = a_round(algorithm, state, {}, info)
    loose = robust("norm-clip", bound=1e9, factor=1e9).combine(updates, algorithm, state, info)
    plain = [algorithm.restored(update, state, info) for update in updates]
    assert all(same(a.groups, b.groups) for a, b in zip(loose.updates, plain, strict=True))
    tight = robust("norm-clip", bound=1e-9).combine(updates, algorithm, state, info)
    assert max(tight.kept.values()) < 1e-6
    for clipped in tight.updates:
        sent = algorithm.message(state, clipped.client, info)["adapter"]
        assert all(torch.allclose(t, sent[n], atol=1e-6) for n, t in clipped.groups["adapter"].items())
    algorithm.aggregate(state, tight.updates, info)


def test_a_hostile_control_variate_is_shortened_too() -> None:
    algorithm, info = built("scaffold"), round_info(sampled=range(5))
    state = algorithm.init(lora_adapter())
    updates = a_round(algorithm, state, {}, info)
    hostile = {**updates[0].groups, "control": {n: t * 1e6 for n, t in updates[0].groups["control"].items()}}
    combined = robust("norm-clip", bound=1e9).combine(
        [replace(updates[0], groups=hostile), *updates[1:]], algorithm, state, info
    )
    assert combined.kept[0] < 1e-5
    assert max(float(t.abs().max()) for t in combined.updates[0].groups["control"].values()) < 100


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract(name: str) -> None:
    check_robust(name)


@pytest.mark.parametrize("name", ["fedavg", "rolora", "scaffold", "fedavgm"])
def test_a_resumed_run_of_centred_clipping_is_the_same_bit_for_bit(name: str) -> None:
    algorithm, combiner = built(name), robust("centered-clip").combine
    plan = FederationPlan(range(5), 3, 6, 0.1, "cosine", 1, 0, ADAPTER_INFO, combine=combiner)
    whole_fleet, fleet = FakeFleet(algorithm), FakeFleet(algorithm)
    whole = list(federate(algorithm, whole_fleet, plan, lora_adapter()))
    assert any(group.startswith("robust-") for group in whole[-1][1])
    for _, (record, state) in zip(range(3), federate(algorithm, fleet, plan, lora_adapter()), strict=False):
        done, saved = record.round + 1, unflatten(flatten(state))
    resumed = list(federate(algorithm, fleet, plan, lora_adapter(), resume=(done, saved)))
    for (record, state), (expected, after) in zip(resumed, whole[done:], strict=True):
        assert same(state, after)
        assert record.kept == expected.kept
    assert not any(same(a[1], b[1]) for a, b in pairwise(whole))
    # The server's memory is not sent.
    assert {group for _, messages in fleet.seen for message in messages.values() for group in message} <= {"adapter", "control"}
