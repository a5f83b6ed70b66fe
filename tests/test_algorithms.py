"""One contract for every algorithm under every regularisation, found through the registries; then each one's own numbers."""

from __future__ import annotations

import random
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import Algorithm, LocalResult, LocalRule, Update, algorithms, regularizations
from fedmllm.algorithms.base import in_order
from fedmllm.algorithms.fedprox import proximal
from fedmllm.errors import ConfigError
from fedmllm.tensors import State, add, clone, digest, flatten, problem_with, scale, select, subtract, unflatten
from helpers import COMBINATIONS, built, lora_adapter, pretend_to_train, quick, round_info, same, tensors, update

every_algorithm = pytest.mark.parametrize(("name", "regularization"), COMBINATIONS)
CLIENTS = (0, 1, 3)


def a_round(algorithm: Algorithm, state: State, memories: dict[int, State], number: int) -> list[Update]:
    """The updates of a round of pretended training; `memories` is brought up to date."""
    info, updates = round_info(number, CLIENTS), []
    for client in CLIENTS:
        received = select(state, algorithm.send)
        one, memories[client] = pretend_to_train(algorithm, client, received, memories.get(client, {}), info)
        updates.append(one)
    return updates


def after_a_round(algorithm: Algorithm) -> tuple[State, list[Update]]:
    """The server's state after one round, and the updates of the next: nothing is still at its start."""
    memories: dict[int, State] = {}
    state = algorithm.init(lora_adapter())
    state = algorithm.aggregate(state, a_round(algorithm, state, memories, 0), round_info(0, CLIENTS))
    return state, a_round(algorithm, state, memories, 1)


def prints(state: State, updates: list[Update]) -> list[str]:
    return [digest(flatten(groups)) for groups in (state, *(u.groups for u in updates))]


@every_algorithm
def test_names_shapes_and_dtypes_of_the_adapter_are_kept(name: str, regularization: str) -> None:
    algorithm, adapter = built(name, regularization), lora_adapter()
    first, updates = after_a_round(algorithm)
    second = algorithm.aggregate(first, updates, round_info(1, CLIENTS))
    for state in (algorithm.init(adapter), first, second):
        assert problem_with(state["adapter"], adapter) is None


@every_algorithm
def test_what_clients_send_is_what_the_server_expects(name: str, regularization: str) -> None:
    algorithm = built(name, regularization)
    state, updates = after_a_round(algorithm)
    assert "adapter" in algorithm.send
    assert set(algorithm.send) <= state.keys()
    expected = algorithm.uploads(state)
    for one in updates:
        assert one.groups.keys() == expected.keys()
        assert all(problem_with(one.groups[group], expected[group]) is None for group in expected)


@every_algorithm
def test_no_function_writes_to_its_inputs(name: str, regularization: str) -> None:
    algorithm, adapter = built(name, regularization), lora_adapter()
    before = digest(adapter)
    state = algorithm.init(adapter)
    for tensor in state["adapter"].values():
        tensor.add_(1)
    assert digest(adapter) == before, "init gave the caller's own tensors away"
    state, updates = after_a_round(algorithm)
    seen = prints(state, updates)
    memories: dict[int, State] = {}
    a_round(algorithm, state, memories, 1)
    kept = dict(memories)
    remembered = [digest(flatten(memory)) for memory in kept.values()]
    a_round(algorithm, state, memories, 2)
    assert [digest(flatten(memory)) for memory in kept.values()] == remembered
    algorithm.uploads(state)
    algorithm.aggregate(state, updates, round_info(1, CLIENTS))
    assert prints(state, updates) == seen


@every_algorithm
@quick
@given(st.randoms(use_true_random=False))
def test_the_order_of_updates_does_not_show_and_nothing_is_random(name: str, regularization: str, order: random.Random) -> None:
    algorithm = built(name, regularization)
    state, updates = after_a_round(algorithm)
    expected = algorithm.aggregate(state, updates, round_info(1, CLIENTS))
    torch.manual_seed(order.randrange(1000))
    order.shuffle(updates)
    assert same(algorithm.aggregate(state, updates, round_info(1, CLIENTS)), expected)


@every_algorithm
@quick
@given(factor=st.integers(2, 1000))
def test_only_the_proportions_of_examples_count(name: str, regularization: str, factor: int) -> None:
    algorithm = built(name, regularization)
    state, updates = after_a_round(algorithm)
    more = [Update(u.client, u.groups, u.examples * factor, u.steps, u.metrics) for u in updates]
    expected, found = (flatten(algorithm.aggregate(state, u, round_info(1, CLIENTS))) for u in (updates, more))
    for tensor in expected:
        torch.testing.assert_close(found[tensor], expected[tensor], rtol=1e-6, atol=1e-7)


@every_algorithm
def test_a_state_that_travelled_flat_goes_on_the_same(name: str, regularization: str) -> None:
    algorithm = built(name, regularization)
    state, updates = after_a_round(algorithm)
    travelled = [Update(u.client, unflatten(flatten(u.groups)), u.examples, u.steps, u.metrics) for u in updates]
    expected = algorithm.aggregate(state, updates, round_info(1, CLIENTS))
    assert same(algorithm.aggregate(unflatten(flatten(state)), travelled, round_info(1, CLIENTS)), expected)


@every_algorithm
def test_no_update_and_two_of_one_client_are_refused(name: str, regularization: str) -> None:
    algorithm = built(name, regularization)
    state, updates = after_a_round(algorithm)
    for bad in ([], [*updates, updates[0]]):
        with pytest.raises(ValueError, match="one from each client"):
            algorithm.aggregate(state, bad, round_info(1, CLIENTS))


def test_updates_are_summed_in_the_order_of_their_clients() -> None:
    # In float64 1e30 + 1 − 1e30 is 0 and 1e30 − 1e30 + 1 is 1: the order of a sum shows where it cancels.
    updates = [update(client, tensors(x=value)) for client, value in enumerate((1e30, 1.0, -1e30))]
    assert [u.client for u in in_order(updates[::-1])] == [0, 1, 2]
    state = {"adapter": tensors(x=0)}
    algorithm = built("fedavg")
    found = {float(algorithm.aggregate(state, list(u), round_info())["adapter"]["x"]) for u in permutations(updates)}
    assert len(found) == 1


# FedAvg

START = tensors(x=1, y=[0, 2])


def two_rounds(algorithm: Algorithm) -> list[State]:
    state = algorithm.init(START)
    states = []
    for number, updates in enumerate(
        (
            [update(0, tensors(x=2, y=[4, 2]), 1), update(1, tensors(x=6, y=[0, 6]), 3)],
            [update(2, tensors(x=7, y=[1, 1]), 2), update(0, tensors(x=1, y=[3, 1]), 2)],
        )
    ):
        state = algorithm.aggregate(state, updates, round_info(number))
        states.append(state)
    return states


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_two_rounds_by_hand(name: str) -> None:
    # Round 0, weights 1/4 and 3/4:   mean x = (2 + 18)/4 = 5, y = [4/4, (2 + 18)/4] = [1, 5]
    #                                 w + ½ (mean − w): x = 1 + ½·4 = 3, y = [0 + ½·1, 2 + ½·3] = [0.5, 3.5]
    # Round 1, weights ½ and ½:       mean x = 4, y = [2, 1];  x = 3 + ½·1 = 3.5, y = [0.5 + ½·1.5, 3.5 − ½·2.5] = [1.25, 2.25]
    first, second = two_rounds(algorithms.build(name, {"server_lr": 0.5}))
    assert same(first, {"adapter": tensors(x=3, y=[0.5, 3.5])})
    assert same(second, {"adapter": tensors(x=3.5, y=[1.25, 2.25])})


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_two_rounds_by_hand_with_equal_weights(name: str) -> None:
    # With a server step of 1 the state is the mean itself: x = (2 + 6)/2, y = [(4 + 0)/2, (2 + 6)/2]; then as above.
    first, second = two_rounds(algorithms.build(name, {"weighting": "uniform"}))
    assert same(first, {"adapter": tensors(x=4, y=[2, 4])})
    assert same(second, {"adapter": tensors(x=4, y=[2, 1])})


@quick
@given(factor=st.floats(-8, 8, width=16))
def test_fedavg_is_linear_in_the_changes(factor: float) -> None:
    algorithm, adapter = algorithms.build("fedavg", {"server_lr": 0.7}), lora_adapter()
    state, updates = algorithm.init(adapter), a_round(algorithm, algorithm.init(adapter), {}, 0)
    scaled = [
        update(u.client, add(adapter, scale(subtract(u.groups["adapter"], adapter), factor)), u.examples) for u in updates
    ]
    plain, stretched = (subtract(algorithm.aggregate(state, u, round_info())["adapter"], adapter) for u in (updates, scaled))
    for name in adapter:
        torch.testing.assert_close(stretched[name], plain[name] * factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_clients_that_learnt_nothing_change_nothing(name: str) -> None:
    algorithm, adapter = algorithms.build(name, {}), lora_adapter()
    state = algorithm.init(adapter)
    assert same(algorithm.aggregate(state, [update(c, clone(adapter), c + 1) for c in range(3)], round_info()), state)


def test_fedavg_uploads_a_copy_and_remembers_nothing() -> None:
    algorithm, trained = algorithms.build("fedavg", {}), tensors(x=5)
    result = LocalResult(tensors(x=1), trained, None, 1, 1, 0.1, {})
    upload, memory = algorithm.finish(result, {"adapter": tensors(x=1)}, {}, round_info())
    trained["x"].add_(1)
    assert same(upload, {"adapter": tensors(x=5)})
    assert memory == {}


# FedProx


def effect(algorithm: Algorithm) -> tuple[dict[str, float], list[bool], bool]:
    """What a rule does, name by name: proximal strengths, what is trained, whether gradients are observed."""
    received = {"adapter": lora_adapter()}
    rule: LocalRule = algorithm.rule(received, {}, round_info())
    assert rule.offset is None
    names = received["adapter"]
    strengths = {name: rule.proximal.get(name, 0.0) for name in names}
    return strengths, [rule.trainable(name) for name in names], rule.observe_gradient


def test_fedprox_ties_every_tensor() -> None:
    strengths, trainable, _ = effect(algorithms.build("fedprox", {"mu": 0.25}))
    assert strengths == dict.fromkeys(lora_adapter(), 0.25)
    assert all(trainable)


@pytest.mark.parametrize("name", algorithms.names())
def test_fedprox_without_strength_is_what_it_wraps(name: str) -> None:
    inner = algorithms.build(name, {})
    assert effect(proximal(inner, 0.0)) == effect(inner)
    assert effect(algorithms.build("fedprox", {"mu": 0.0})) == effect(algorithms.build("fedavg", {}))


def test_fedprox_around_fedprox_adds_up() -> None:
    twice = regularizations.build("fedprox", {"mu": 0.5})(algorithms.build("fedprox", {"mu": 0.25}))
    assert set(effect(twice)[0].values()) == {0.75}


@pytest.mark.parametrize("options", [{"mu": -0.1}, {"mu": float("nan")}, {"server_lr": 0.0}, {"server_lr": float("inf")}])
def test_strengths_and_steps_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"^algorithm"):
        algorithms.build("fedprox", options)
    if "mu" in options:
        with pytest.raises(ConfigError, match=r"^regularization"):
            regularizations.build("fedprox", options)
