"""What the round loop, fleets, checkpoints and compressions rely on in every algorithm."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import cycle, islice, permutations

import torch

from fedmllm.algorithms import Algorithm, Update
from fedmllm.algorithms.screening import screen
from fedmllm.algorithms.toy_federation import CLIENTS, lora_adapter, round_info, run_rounds, same, train_round
from fedmllm.algorithms.traffic import traffic_of
from fedmllm.rng import stream
from fedmllm.tensors import State, digest, flatten, problem_with, unflatten

INFO = round_info(1, CLIENTS)


@dataclass(frozen=True)
class Case:
    """An algorithm in its second round, in which no state or memory has its initial value: the state before it, the updates
    of the clients, and the state after it."""

    algorithm: Algorithm
    state: State
    updates: tuple[Update, ...]
    after: State

    @classmethod
    def of(cls, algorithm: Algorithm) -> Case:
        state, updates, after, _ = next(islice(run_rounds(algorithm, INFO.rounds), INFO.round, None))
        return cls(algorithm, state, tuple(updates), after)


def check(algorithm: Algorithm) -> None:
    """Run every check of this module."""
    case = Case.of(algorithm)
    for rule in (
        _keeps_the_adapters_tensors, _learns, _expects_what_clients_send, _modifies_no_input, _ignores_the_order_of_updates,
        _depends_on_the_proportions_of_examples, _continues_from_a_flat_state, _needs_one_update_per_client,
        _refuses_nan_and_infinity, _accepts_a_new_client_late, _has_traffic,
    ):  # fmt: skip
        rule(case)


def _keeps_the_adapters_tensors(case: Case) -> None:
    initial = lora_adapter()
    for state in (case.algorithm.init(initial), case.state, case.after):
        problem = problem_with(state["adapter"], initial)
        assert problem is None, f"the adapter in the server's state: {problem}"


def _learns(case: Case) -> None:
    start = flatten({"adapter": lora_adapter()})
    learnt = (name not in start or not torch.equal(tensor, start[name]) for name, tensor in flatten(case.state).items())
    assert any(learnt), "a round leaves the server's state as it was"


def _expects_what_clients_send(case: Case) -> None:
    for client in CLIENTS:
        message = case.algorithm.message(case.state, client, INFO)
        assert message.keys() <= case.state.keys(), "`message` has a group that the server's state does not have"
    valid, refused = screen(case.updates, case.algorithm, case.state, INFO)
    assert not refused, f"an update of `finish` is refused, see `uploads` and `refuse`: {refused[0]['why']}"
    assert tuple(valid) == case.updates


def _modifies_no_input(case: Case) -> None:
    algorithm, adapter = case.algorithm, lora_adapter()
    before = digest(adapter)
    for tensor in algorithm.init(adapter)["adapter"].values():
        tensor.add_(1)
    assert digest(adapter) == before, "`init` returns the caller's own tensors instead of copies"
    digests = _digests(case)
    memories: dict[int, State] = {}
    train_round(algorithm, case.state, memories, INFO)
    old = dict(memories)
    remembered = [digest(flatten(memory)) for memory in old.values()]
    train_round(algorithm, case.state, memories, round_info(2, CLIENTS))
    assert [digest(flatten(memory)) for memory in old.values()] == remembered, "a client's old memory was modified"
    for update in case.updates:
        algorithm.uploads(case.state, update.client, INFO)
        algorithm.refuse(update, case.state, INFO)
    algorithm.aggregate(case.state, case.updates, INFO)
    assert _digests(case) == digests, "the server's state or an update was modified"


def _digests(case: Case) -> list[str]:
    return [digest(flatten(state)) for state in (case.state, *(update.groups for update in case.updates))]


def _ignores_the_order_of_updates(case: Case) -> None:
    orders = permutations(case.updates)
    for seed, shuffled in enumerate(islice(orders, 1, None, 2)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            after = case.algorithm.aggregate(case.state, list(shuffled), INFO)
        assert same(after, case.after), "`aggregate` depends on the order of updates (use `in_order`) or on a global generator"


def _depends_on_the_proportions_of_examples(case: Case) -> None:
    expected = flatten(case.after)
    for factor in (3, 1000):
        scaled = [replace(update, examples=update.examples * factor) for update in case.updates]
        after = flatten(case.algorithm.aggregate(case.state, scaled, INFO))
        for name, tensor in expected.items():
            close = torch.allclose(after[name], tensor, rtol=1e-6, atol=1e-7)
            assert close, f"{name!r} changes if all clients have {factor} times as many examples"


def _continues_from_a_flat_state(case: Case) -> None:
    """Checkpoints and messages are flat; groups without tensors do not survive."""
    updates = [replace(update, groups=unflatten(flatten(update.groups))) for update in case.updates]
    after = case.algorithm.aggregate(unflatten(flatten(case.state)), updates, INFO)
    assert same(after, case.after), "`aggregate` gives another result after its inputs were saved and loaded"


def _needs_one_update_per_client(case: Case) -> None:
    for updates in ([], [*case.updates, case.updates[0]]):
        try:
            case.algorithm.aggregate(case.state, updates, INFO)
        except ValueError:
            continue
        raise AssertionError("`aggregate` must raise ValueError for no updates and for two of one client (use `in_order`)")


def _refuses_nan_and_infinity(case: Case) -> None:
    rng = stream(0, "spoilt")
    first, second, *others = case.updates
    groups = flatten(second.groups)
    names = [name for name, tensor in groups.items() if tensor.is_floating_point()]
    for name, value in zip(names, cycle((math.nan, math.inf, -math.inf)), strict=False):
        spoilt = groups[name].clone()
        spoilt.view(-1)[int(rng.integers(spoilt.numel()))] = value
        update = replace(second, groups=unflatten({**groups, name: spoilt}))
        valid, refused = screen([first, update, *others], case.algorithm, case.state, INFO)
        assert [entry["client"] for entry in refused] == [second.client], f"{value} in {name!r} is not refused"
        assert "NaN or infinity" in str(refused[0]["why"]), f"{value} in {name!r}: {refused[0]['why']}"
        assert [u.client for u in valid] == [first.client, *(u.client for u in others)], "the other updates are refused too"


def _accepts_a_new_client_late(case: Case) -> None:
    algorithm, info = case.algorithm, round_info(1, (2, 4))
    updates = train_round(algorithm, case.state, {}, info)
    refused = screen(updates, algorithm, case.state, info)[1]
    assert not refused, f"a client that takes part for the first time in round 1: {refused[0]['why']}"
    problem = problem_with(algorithm.aggregate(case.state, updates, info)["adapter"], lora_adapter())
    assert problem is None, f"the adapter after new clients: {problem}"


def _has_traffic(case: Case) -> None:
    """`fedmllm list algorithms` shows it."""
    traffic = traffic_of(case.algorithm)
    assert traffic["up"], "clients send nothing"
    groups = {entry.partition(" ")[0] for entries in traffic.values() for entry in entries}
    assert all(group and "/" not in group for group in groups), f"invalid group names: {sorted(groups)}"
