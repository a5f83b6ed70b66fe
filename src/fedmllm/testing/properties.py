"""What an algorithm's declared properties (`averages`, `needs_lora`, `unequal_ranks`, `personal`) promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch

from fedmllm.algorithms import Algorithm, Update, own_adapter
from fedmllm.algorithms.factors import rank_of
from fedmllm.algorithms.screening import screen
from fedmllm.algorithms.toy_federation import CLIENTS, lora_adapter, round_info, run_rounds, same, train_round
from fedmllm.tensors import State, Tensors, flatten, problem_with, weighted_mean

RANKS = {0: 1, 1: 3, 3: 2}


def check(algorithm: Algorithm) -> None:
    """Run every check of this module that applies."""
    check_personal(algorithm)
    if algorithm.averages is not None:
        check_averages(algorithm)
    if algorithm.unequal_ranks:
        check_unequal_ranks(algorithm)
    if algorithm.needs_lora:
        check_refuses_other_adapters(algorithm)
    else:
        check_any_adapter(algorithm)


def check_averages(algorithm: Algorithm) -> None:
    """Copies of the updates' mean give the same state, and valid uploads can be derived from the message: secure aggregation
    relies on both."""
    for state, updates, after, info in run_rounds(algorithm, rounds=2):
        restored = [algorithm.restored(update, state, info) for update in updates]
        of_copies = algorithm.aggregate(state, _copies_of_the_mean(restored, algorithm.averages == "examples"), info)
        for name, tensor in flatten(after).items():
            close = torch.allclose(flatten(of_copies)[name], tensor, rtol=1e-4, atol=1e-5)
            assert close, f"`averages` is set, but {name!r} depends on more than the mean of the updates"
        for client in CLIENTS:
            message = algorithm.message(state, client, info)
            derived = algorithm.uploads(message, client, info)
            assert same(derived, algorithm.uploads(state, client, info)), "`uploads` needs more than what `message` sends"


def _copies_of_the_mean(updates: Sequence[Update], by_examples: bool) -> list[Update]:
    weights = [update.examples if by_examples else 1 for update in updates]
    mean = {group: weighted_mean([update.groups[group] for update in updates], weights) for group in updates[0].groups}
    return [replace(update, groups=mean, examples=7) for update in updates]


def check_unequal_ranks(algorithm: Algorithm) -> None:
    """Messages and uploads have each client's rank, and the server's adapter keeps its own."""
    for state, updates, after, info in run_rounds(algorithm, adapter=lora_adapter(rank=3), ranks=RANKS):
        refused = screen(updates, algorithm, state, info)[1]
        assert not refused, f"an update of the client's own rank is refused: {refused[0]['why']}"
        for update in updates:
            sent = rank_of(algorithm.message(state, update.client, info)["adapter"])
            assert sent == rank_of(update.groups["adapter"]) == RANKS[update.client], (
                "a client was sent another rank than its own"
            )
        assert rank_of(after["adapter"]) == 3, "the rank of the server's adapter has changed"
        assert same(algorithm.aggregate(state, updates[::-1], info), after), "the order of updates matters at unequal ranks"


def check_personal(algorithm: Algorithm) -> None:
    """After two rounds, the clients' models differ if and only if the algorithm is personal."""
    memories: dict[int, State] = {}
    initial = lora_adapter()
    state, info = algorithm.init(initial), round_info(0, CLIENTS)
    for number in range(2):
        info = round_info(number, CLIENTS)
        state = algorithm.aggregate(state, train_round(algorithm, state, memories, info), info)
    models = [own_adapter(algorithm.message(state, c, info), memories[c], initial) for c in CLIENTS]
    for first, second in combinations(models, 2):
        equal = same({"adapter": first}, {"adapter": second})
        assert equal != algorithm.personal, f"`personal` is {algorithm.personal}, but the clients' models are equal: {equal}"


def check_refuses_other_adapters(algorithm: Algorithm) -> None:
    """`init` raises ValueError for adapters that are not pairs of A and B."""
    for adapter in (_plain_adapter(), {**lora_adapter(), "module.lora_magnitude_vector": torch.ones(3)}):
        try:
            algorithm.init(adapter)
        except ValueError:
            continue
        raise AssertionError("`needs_lora` is set, but `init` accepts an adapter that is not LoRA (use `lora_state`)")


def check_any_adapter(algorithm: Algorithm) -> None:
    """Tensors of any names and shapes are aggregated."""
    initial = _plain_adapter()
    for _, _, after, _ in run_rounds(algorithm, rounds=2, adapter=initial):
        problem = problem_with(after["adapter"], initial)
        assert problem is None, f"with an adapter that is not LoRA (set `needs_lora` if it cannot work): {problem}"


def _plain_adapter() -> Tensors:
    return {"vector": torch.ones(3), "tokens": torch.zeros(4, 2)}
