"""FedAvg and FedProx: numbers worked out by hand and identities; options of the classic algorithms that are out of range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import Algorithm, LocalResult, LocalRule, algorithms, complete, regularizations
from fedmllm.algorithms.fedprox import proximal
from fedmllm.algorithms.screening import change_norms
from fedmllm.errors import ConfigError
from fedmllm.tensors import State, add, clone, scale, subtract
from helpers import (
    a_round,
    lora_adapter,
    quick,
    round_info,
    rounds_of,
    same,
    tensors,
    update,
)

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
    state, updates = algorithm.init(adapter), a_round(algorithm, algorithm.init(adapter), {}, round_info())
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
    """What a fresh client's rule does, name by name: proximal strengths, what is trained, whether gradients are observed."""
    initial, info = lora_adapter(), round_info()
    received = complete(algorithm.message(algorithm.init(initial), 0, info), {}, initial)
    rule: LocalRule = algorithm.rule(received, {}, info)
    assert rule.offset is None or not any(bool(t.any()) for t in rule.offset.values())
    strengths = {name: rule.proximal.get(name, 0.0) for name in initial}
    return strengths, [rule.trainable(name) for name in initial], rule.observe_gradient


def test_fedprox_ties_every_tensor() -> None:
    strengths, trainable, _ = effect(algorithms.build("fedprox", {"mu": 0.25}))
    assert strengths == dict.fromkeys(lora_adapter(), 0.25)
    assert all(trainable)


@pytest.mark.parametrize("name", algorithms.names())
def test_fedprox_without_strength_is_what_it_wraps(name: str) -> None:
    inner = algorithms.build(name, {})
    assert effect(proximal(inner, 0.0)) == effect(inner)
    whole, wrapped = ([after for _, _, after, _ in rounds_of(a)] for a in (inner, proximal(inner, 0.0)))
    assert all(same(a, b) for a, b in zip(whole, wrapped, strict=True))


@pytest.mark.parametrize("name", algorithms.names())
def test_fedprox_composes_with_every_algorithm(name: str) -> None:
    """It adds to the strengths that the algorithm has, and holds what is trained closer to where it started.

    YOCO's sign term becomes steep near 0, where a step of plain gradient descent may overshoot; not with γ = 1.
    """
    inner = algorithms.build(name, {"gamma_max": 1.0} if name == "yoco" else {})
    plain, tied = effect(inner), effect(proximal(inner, 0.5))
    assert {n: s - plain[0][n] for n, s in tied[0].items()} == pytest.approx(dict.fromkeys(lora_adapter(), 0.5))
    assert tied[1:] == plain[1:]
    number = 1 if inner.needs_core else 0  # there, the first round trains nothing
    (state, free, _, info), (_, held, _, _) = (list(rounds_of(a))[number] for a in (inner, proximal(inner, 2.0)))
    for a, b in zip(free, held, strict=True):
        free_path, held_path = (change_norms(u, inner, state, info)["adapter"] for u in (a, b))
        assert held_path < free_path


def test_fedprox_around_fedprox_adds_up() -> None:
    twice = regularizations.build("fedprox", {"mu": 0.5})(algorithms.build("fedprox", {"mu": 0.25}))
    assert set(effect(twice)[0].values()) == {0.75}


OUT_OF_RANGE = [
    ("fedprox", {"mu": -0.1}),
    ("fedprox", {"mu": float("nan")}),
    ("fedprox", {"server_lr": 0.0}),
    ("fedprox", {"server_lr": float("inf")}),
    ("fedavgm", {"momentum": 1.0}),
    ("fedavgm", {"dampening": 1.0}),
    ("fedadagrad", {"tau": 0.0}),
    ("fedadam", {"beta1": -0.1}),
    ("fedadam", {"beta2": 1.0}),
    ("fedyogi", {"server_lr": -1.0}),
    ("fedyogi", {"beta2": 1.5}),
    ("fednova", {"server_lr": 0.0}),
    ("scaffold", {"server_lr": 0.0}),
    ("scaffold", {"weighting": "none"}),
    ("feddyn", {"a": 0.0}),
]


@pytest.mark.parametrize(("name", "options"), OUT_OF_RANGE, ids=str)
def test_strengths_and_steps_out_of_range_are_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"^algorithm.*" + next(iter(options))):
        algorithms.build(name, options)
    if "mu" in options:
        with pytest.raises(ConfigError, match=r"^regularization"):
            regularizations.build("fedprox", options)
