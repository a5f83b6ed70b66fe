"""One contract for every algorithm in every wrapper, found through the registries."""

from __future__ import annotations

import math
import random
from functools import cache
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmllm.algorithms import Algorithm, Update, algorithms
from fedmllm.algorithms.base import in_order
from fedmllm.algorithms.traffic import traffic_of
from fedmllm.federation import screen
from fedmllm.tensors import State, digest, flatten, problem_with, unflatten
from helpers import (
    CLIENTS,
    COMBINATIONS,
    a_round,
    built,
    lora_adapter,
    quick,
    round_info,
    same,
    tensors,
    update,
)

every_algorithm = pytest.mark.parametrize("parts", COMBINATIONS, ids="-".join)
Parts = tuple[str, str, str]
brief = settings(quick, max_examples=8)
INFO = round_info(1, CLIENTS)


@cache
def _after_a_round(parts: Parts) -> tuple[Algorithm, State, tuple[Update, ...]]:
    algorithm = built(*parts)
    memories: dict[int, State] = {}
    state = algorithm.init(lora_adapter())
    state = algorithm.aggregate(state, a_round(algorithm, state, memories, round_info(0, CLIENTS)), round_info(0, CLIENTS))
    return algorithm, state, tuple(a_round(algorithm, state, memories, INFO))


def after_a_round(parts: Parts) -> tuple[Algorithm, State, list[Update]]:
    """The algorithm, its state after one round, and the updates of the next: nothing is still at its start."""
    algorithm, state, updates = _after_a_round(parts)
    return algorithm, state, list(updates)


def prints(state: State, updates: list[Update]) -> list[str]:
    return [digest(flatten(groups)) for groups in (state, *(u.groups for u in updates))]


@every_algorithm
def test_names_shapes_and_dtypes_of_the_adapter_are_kept(parts: Parts) -> None:
    algorithm, adapter = built(*parts), lora_adapter()
    _, first, updates = after_a_round(parts)
    second = algorithm.aggregate(first, updates, INFO)
    for state in (algorithm.init(adapter), first, second):
        assert problem_with(state["adapter"], adapter) is None


@every_algorithm
def test_the_adapter_learns(parts: Parts) -> None:
    _, state, _ = after_a_round(parts)
    flat, start = flatten(state), {f"adapter/{name}": tensor for name, tensor in lora_adapter().items()}
    assert any(name not in start or not torch.equal(tensor, start[name]) for name, tensor in flat.items())


@every_algorithm
def test_what_clients_send_is_what_the_server_expects(parts: Parts) -> None:
    algorithm, state, updates = after_a_round(parts)
    for client in CLIENTS:
        assert algorithm.message(state, client, INFO).keys() <= state.keys()
    assert screen(updates, algorithm, state, INFO) == (updates, [])


@every_algorithm
def test_no_function_writes_to_its_inputs(parts: Parts) -> None:
    algorithm, adapter = built(*parts), lora_adapter()
    before = digest(adapter)
    state = algorithm.init(adapter)
    for tensor in state["adapter"].values():
        tensor.add_(1)
    assert digest(adapter) == before, "init gave the caller's own tensors away"
    _, state, updates = after_a_round(parts)
    seen = prints(state, updates)
    memories: dict[int, State] = {}
    a_round(algorithm, state, memories, INFO)
    kept = dict(memories)
    remembered = [digest(flatten(memory)) for memory in kept.values()]
    a_round(algorithm, state, memories, round_info(2, CLIENTS))
    assert [digest(flatten(memory)) for memory in kept.values()] == remembered
    for one in updates:
        algorithm.uploads(state, one.client, INFO)
        algorithm.refuse(one, state, INFO)
    algorithm.aggregate(state, updates, INFO)
    assert prints(state, updates) == seen


@every_algorithm
@brief
@given(st.randoms(use_true_random=False))
def test_the_order_of_updates_does_not_show_and_nothing_is_random(parts: Parts, order: random.Random) -> None:
    algorithm, state, updates = after_a_round(parts)
    expected = algorithm.aggregate(state, updates, INFO)
    torch.manual_seed(order.randrange(1000))
    order.shuffle(updates)
    assert same(algorithm.aggregate(state, updates, INFO), expected)


@every_algorithm
@brief
@given(factor=st.integers(2, 1000))
def test_only_the_proportions_of_examples_count(parts: Parts, factor: int) -> None:
    algorithm, state, updates = after_a_round(parts)
    more = [Update(u.client, u.groups, u.examples * factor, u.steps, u.metrics) for u in updates]
    expected, found = (flatten(algorithm.aggregate(state, u, INFO)) for u in (updates, more))
    for tensor in expected:
        torch.testing.assert_close(found[tensor], expected[tensor], rtol=1e-6, atol=1e-7)


@every_algorithm
def test_a_state_that_travelled_flat_goes_on_the_same(parts: Parts) -> None:
    algorithm, state, updates = after_a_round(parts)
    travelled = [Update(u.client, unflatten(flatten(u.groups)), u.examples, u.steps, u.metrics) for u in updates]
    expected = algorithm.aggregate(state, updates, INFO)
    assert same(algorithm.aggregate(unflatten(flatten(state)), travelled, INFO), expected)


@every_algorithm
def test_no_update_and_two_of_one_client_are_refused(parts: Parts) -> None:
    algorithm, state, updates = after_a_round(parts)
    for bad in ([], [*updates, updates[0]]):
        with pytest.raises(ValueError, match="one from each client"):
            algorithm.aggregate(state, bad, INFO)


@every_algorithm
@brief
@given(data=st.data())
def test_an_update_with_nan_or_infinity_anywhere_is_refused(parts: Parts, data: st.DataObject) -> None:
    algorithm, state, updates = after_a_round(parts)
    flat = {name: tensor.clone() for name, tensor in flatten(updates[1].groups).items()}
    name = data.draw(st.sampled_from(sorted(n for n, t in flat.items() if t.is_floating_point())))
    place = data.draw(st.integers(0, flat[name].numel() - 1))
    flat[name].view(-1)[place] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    spoilt = Update(updates[1].client, unflatten(flat), updates[1].examples, updates[1].steps)
    good, refused = screen([updates[0], spoilt, updates[2]], algorithm, state, INFO)
    assert [u.client for u in good] == [updates[0].client, updates[2].client]
    assert [r["client"] for r in refused] == [spoilt.client]
    assert "NaN or infinity" in str(refused[0]["why"])


@every_algorithm
def test_a_client_that_took_no_part_before_can_join_late(parts: Parts) -> None:
    algorithm, state, _ = after_a_round(parts)
    info = round_info(1, (2, 4))
    updates = a_round(algorithm, state, {}, info)
    assert screen(updates, algorithm, state, info)[1] == []
    assert problem_with(algorithm.aggregate(state, updates, info)["adapter"], lora_adapter()) is None


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_says_what_travels(name: str) -> None:
    told = traffic_of(algorithms.build(name, {}))
    assert told["up"]
    assert all(
        entry.partition(" ")[0] in ("adapter", "control", "fold", "normaliser") for way in told.values() for entry in way
    )


def test_what_travels_is_what_the_papers_say() -> None:
    told = {name: traffic_of(algorithms.build(name, {})) for name in algorithms.names()}
    assert told["fedavg"] == {"down": ["adapter"], "up": ["adapter"]}
    assert told["ffa-lora"] == {"down": ["adapter (B)"], "up": ["adapter (B)"]}
    assert told["fedsa-lora"] == {"down": ["adapter (A)"], "up": ["adapter (A)"]}
    assert told["rolora"] == {"down": ["adapter"], "up": ["adapter (A)", "adapter (B)"]}
    assert told["fedsvd"] == {"down": ["adapter"], "up": ["adapter (B)"]}
    assert told["flora"] == told["fedex-lora"] == {"down": ["adapter", "fold"], "up": ["adapter"]}
    assert told["scaffold"] == {"down": ["adapter", "control"], "up": ["adapter", "control"]}


def test_updates_are_summed_in_the_order_of_their_clients() -> None:
    # In float64 1e30 + 1 − 1e30 is 0 and 1e30 − 1e30 + 1 is 1: the order of a sum shows where it cancels.
    updates = [update(client, tensors(x=value)) for client, value in enumerate((1e30, 1.0, -1e30))]
    assert [u.client for u in in_order(updates[::-1])] == [0, 1, 2]
    state = {"adapter": tensors(x=0)}
    algorithm = built("fedavg")
    found = {float(algorithm.aggregate(state, list(u), round_info())["adapter"]["x"]) for u in permutations(updates)}
    assert len(found) == 1
