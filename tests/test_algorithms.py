"""Algorithms and their wrappers keep the contract of `fedmllm.testing`, and the contract finds what breaks it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch

from fedmllm.algorithms import Algorithm, LocalRule, RoundInfo, Update, algorithms, compressions, regularizations
from fedmllm.algorithms.base import groups, in_order, send_adapter
from fedmllm.algorithms.factors import lora_state
from fedmllm.algorithms.fedavg import fedavg
from fedmllm.algorithms.traffic import traffic_of
from fedmllm.tensors import State
from fedmllm.testing import check_algorithm, check_compression, check_regularization, contract, properties
from fedmllm.testing.registered import check_registered
from helpers import built, lora_adapter, round_info, tensors, update


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_keeps_the_contract(name: str) -> None:
    check_algorithm(name)


@pytest.mark.parametrize("name", [name for name in regularizations.names() if name != "none"])
def test_every_regularization_keeps_the_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above checks it around every other algorithm."""
    for inner in algorithms.names():
        assert built(inner, name).averages == built(inner).averages
    monkeypatch.setattr(algorithms, "names", lambda: ["scaffold"])
    check_regularization(name)


@pytest.mark.parametrize("name", [name for name in compressions.names() if name != "none"])
def test_every_compression_keeps_the_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first test checks it around every other algorithm."""
    monkeypatch.setattr(algorithms, "names", lambda: ["flexlora", "scaffold"])
    check_compression(name)


def test_the_wrappers_called_none_change_nothing() -> None:
    algorithm = fedavg()
    for registry in (regularizations, compressions):
        check_registered(registry, "none")
        assert registry.build("none", {})(algorithm) is algorithm


def test_top_k_without_feedback_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the algorithms that make new factors each round: the first test checks the others, with feedback."""
    refactoring = [name for name in algorithms.names() if algorithms.build(name, {}).refactors]
    assert len(refactoring) >= 3
    monkeypatch.setattr(algorithms, "names", lambda: refactoring)
    check_compression("top-k", feedback=False)


# What the contract finds

Change = Callable[[Algorithm], dict[str, Any]]


def no_copy(plain: Algorithm) -> dict[str, Any]:
    return {"init": lambda adapter: {"adapter": adapter}}


def unsorted_sum(plain: Algorithm) -> dict[str, Any]:
    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        in_order(updates)
        first = updates[0].groups["adapter"]
        return {"adapter": {name: t + torch.rand(()) * 0 for name, t in first.items()}}

    return {"aggregate": aggregate}


def in_place(plain: Algorithm) -> dict[str, Any]:
    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        after = plain.aggregate(state, updates, info)
        for tensor in state["adapter"].values():
            tensor.mul_(0.5)
        return after

    return {"aggregate": aggregate}


def by_count(plain: Algorithm) -> dict[str, Any]:
    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        after = plain.aggregate(state, updates, info)
        total = sum(u.examples for u in updates)
        return {"adapter": {name: t * (1 + 1e-3 * total) for name, t in after["adapter"].items()}}

    return {"aggregate": aggregate}


def unannounced(plain: Algorithm) -> dict[str, Any]:
    def finish(result: Any, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        return {**send_adapter(result, received, memory, info)[0], "extra": tensors(x=1)}, {}

    return {"finish": finish}


def keeps_zeros(plain: Algorithm) -> dict[str, Any]:
    return {"aggregate": lambda state, updates, info: {"adapter": {n: t + 0 for n, t in state["adapter"].items()}} | {}}


def any_number(plain: Algorithm) -> dict[str, Any]:
    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        first = min(updates, key=lambda u: u.client) if updates else update(0, state["adapter"])
        return {"adapter": {name: t + 0 for name, t in first.groups["adapter"].items()}}

    return {"aggregate": aggregate}


def other_dtype(plain: Algorithm) -> dict[str, Any]:
    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        return {"adapter": {n: t.double() for n, t in plain.aggregate(state, updates, info)["adapter"].items()}}

    return {"aggregate": aggregate}


BROKEN = [
    (no_copy, "instead of copies"),
    (unsorted_sum, "order of updates"),
    (in_place, "modified|saved and loaded|order of updates"),
    (by_count, "times as many examples"),
    (unannounced, "an update of `finish` is refused"),
    (keeps_zeros, "as it was"),
    (any_number, "must raise ValueError"),
    (other_dtype, "dtype torch.float64"),
]


@pytest.mark.parametrize(("change", "sentence"), BROKEN, ids=[change.__name__ for change, _ in BROKEN])
def test_the_contract_finds_a_broken_algorithm(change: Change, sentence: str) -> None:
    plain = fedavg()
    with pytest.raises(AssertionError, match=sentence):
        contract.check(replace(plain, **change(plain)))


def test_the_contract_finds_a_compression_that_packs_other_dtypes_than_it_announces() -> None:
    int8 = built("fedavg", compression="int8")

    def finish(result: Any, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        upload, memory = int8.finish(result, received, memory, info)
        return {**upload, "step": {name: step.double() for name, step in upload["step"].items()}}, memory

    with pytest.raises(AssertionError, match="dtype"):
        contract.check(replace(int8, finish=finish))


def median(**properties_: Any) -> Algorithm:
    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        stacks = [u.groups["adapter"] for u in in_order(updates)]
        return {"adapter": {name: torch.stack([s[name] for s in stacks]).median(0).values for name in stacks[0]}}

    return replace(fedavg(), aggregate=aggregate, averages=None, **properties_)


PROMISES = [
    (lambda: replace(median(), averages="examples"), "more than the mean"),
    (lambda: replace(fedavg(), needs_lora=True), "accepts an adapter that is not LoRA"),
    (lambda: replace(fedavg(), init=lora_state), "not a LoRA adapter"),
    (lambda: replace(fedavg(), unequal_ranks=True), "another rank than its own|shape"),
    (lambda: replace(fedavg(), personal=True), "`personal` is True"),
    (lambda: replace(algorithms.build("fedsa-lora", {}), personal=False), "`personal` is False"),
]


@pytest.mark.parametrize(("make", "sentence"), PROMISES, ids=[sentence for _, sentence in PROMISES])
def test_the_contract_finds_a_property_that_does_not_hold(make: Callable[[], Algorithm], sentence: str) -> None:
    properties.check(median())
    with pytest.raises((AssertionError, ValueError), match=sentence):
        properties.check(make())


# What is sent


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_has_traffic(name: str) -> None:
    algorithm, initial, info = algorithms.build(name, {}), lora_adapter(), round_info()
    traffic = traffic_of(algorithm)
    assert {entry.partition(" ")[0] for entry in traffic["up"]} == algorithm.uploads(algorithm.init(initial), 0, info).keys()
    assert {entry.partition(" ")[0] for entry in traffic["down"]} >= algorithm.message(algorithm.init(initial), 0, info).keys()


def test_traffic_is_what_the_papers_say() -> None:
    traffic = {name: traffic_of(algorithms.build(name, {})) for name in algorithms.names()}
    assert traffic["fedavg"] == {"down": ["adapter"], "up": ["adapter"]}
    assert traffic["ffa-lora"] == {"down": ["adapter (B)"], "up": ["adapter (B)"]}
    assert traffic["fedsa-lora"] == {"down": ["adapter (A)"], "up": ["adapter (A)"]}
    assert traffic["rolora"] == {"down": ["adapter"], "up": ["adapter (A)", "adapter (B)"]}
    assert traffic["fedsvd"] == {"down": ["adapter"], "up": ["adapter (B)"]}
    for name in ("flora", "fedex-lora", "fedmomentum"):
        assert traffic[name] == {"down": ["adapter", "fold"], "up": ["adapter"]}
    assert traffic["fedrot-lora"] == traffic["flora-na"] == traffic["fedavg"]
    assert traffic["scaffold"] == {"down": ["adapter", "control"], "up": ["adapter", "control"]}


def test_traffic_gives_an_algorithm_all_that_a_run_gives() -> None:
    """Metrics, the learning rate, layers, and what the rule asks for; nothing that it did not ask for."""
    plain, seen = fedavg(), []

    def rule(received: State, memory: State, info: RoundInfo) -> LocalRule:
        assert info.lr > 0
        assert info.me.client in info.sampled
        assert 0 <= info.me.client < info.clients
        assert set(info.adapter.layer.values()) == set(range(info.adapter.layers)) == set(range(6))
        assert info.adapter.layer.keys() == received["adapter"].keys()
        return LocalRule(observe_loss=True)

    def finish(result: Any, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        assert result.mean_gradient is None
        assert result.loss_before > result.metrics["loss"] > 0, "plain gradient descent lowers the loss"
        assert result.lr == info.lr
        return send_adapter(result, received, memory, info)

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        seen.extend((u.metrics["loss"], u.metrics["padding"], u.examples, u.steps) for u in updates)
        return plain.aggregate(state, updates, info)

    assert traffic_of(replace(plain, rule=rule, finish=finish, aggregate=aggregate)) == {"down": ["adapter"], "up": ["adapter"]}
    assert len(seen) == 9
    assert len({loss for loss, *_ in seen}) == 9
    assert all(padding == 0 and examples > 0 and steps > 0 for _, padding, examples, steps in seen)


def test_a_message_leaves_out_groups_that_do_not_exist_yet() -> None:
    state = {"a": tensors(x=1), "b": tensors(x=2)}
    assert groups("b", "c")(state, 0, round_info()) == {"b": state["b"]}


# Order


def test_updates_are_summed_in_the_order_of_their_clients() -> None:
    # In float64 1e30 + 1 − 1e30 is 0 and 1e30 − 1e30 + 1 is 1: the order of a sum shows where it cancels.
    updates = [update(client, tensors(x=value)) for client, value in enumerate((1e30, 1.0, -1e30))]
    assert [u.client for u in in_order(updates[::-1])] == [0, 1, 2]
    state = {"adapter": tensors(x=0)}
    algorithm = built("fedavg")
    found = {float(algorithm.aggregate(state, list(u), round_info())["adapter"]["x"]) for u in permutations(updates)}
    assert len(found) == 1


def test_no_update_and_two_of_one_client_are_refused_with_the_clients() -> None:
    for bad in ([], [update(4, tensors(x=1)), update(4, tensors(x=1))]):
        with pytest.raises(ValueError, match="one from each client"):
            in_order(bad)
