"""A small LoRA adapter, and rounds and fleets of toy clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from fedmllm.algorithms import AdapterInfo, Algorithm, ClientInfo, RoundInfo, Update, complete
from fedmllm.algorithms.factors import A, B
from fedmllm.algorithms.toy_client import LR, train_toy_client
from fedmllm.rng import stream
from fedmllm.tensors import State, Tensors, flatten

CLIENTS = (0, 1, 3)


def lora_adapter(layers: int = 6, rank: int = 2) -> Tensors:
    """An adapter with PEFT's names: A: (rank, 3) is random and B: (4, rank) is zero, as LoRA starts."""
    rng, adapter = stream(0, "lora_adapter"), {}
    for layer in range(layers):
        module = f"base_model.model.model.text_model.layers.{layer}.self_attn.q_proj"
        adapter[module + A] = torch.tensor(rng.normal(size=(rank, 3)), dtype=torch.float32)
        adapter[module + B] = torch.zeros(4, rank)
    return adapter


ADAPTER_INFO = AdapterInfo(layers=6, layer={name: int(name.split(".")[5]) for name in lora_adapter()}, alpha=3.0)


def round_info(
    round: int = 0,
    sampled: Sequence[int] = (0, 1, 2),
    rounds: int = 3,
    clients: int = 5,
    client: ClientInfo | None = None,
    ranks: Mapping[int, int] | None = None,
) -> RoundInfo:
    return RoundInfo(round, rounds, clients, tuple(sampled), 0, ADAPTER_INFO, ranks or {}, client, LR)


def same(a: State, b: State) -> bool:
    """Whether both states have the same groups and names, and the same tensors bit for bit."""
    x, y = flatten(a), flatten(b)
    return x.keys() == y.keys() and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)


def train_round(
    algorithm: Algorithm, state: State, memories: dict[int, State], info: RoundInfo, initial: Tensors | None = None
) -> list[Update]:
    """The updates of a round; `memories` gets the clients' new memories."""
    updates = []
    for client in info.sampled:
        message = algorithm.message(state, client, info)
        memory = memories.get(client, {})
        update, memories[client] = train_toy_client(algorithm, client, message, memory, info, initial or lora_adapter())
        updates.append(update)
    return updates


def run_rounds(
    algorithm: Algorithm,
    rounds: int = 4,
    adapter: Tensors | None = None,
    sampled: Callable[[int], Sequence[int]] = lambda number: CLIENTS,
    ranks: Mapping[int, int] | None = None,
) -> Iterator[tuple[State, list[Update], State, RoundInfo]]:
    """(state before, updates, state after, info) of each round."""
    initial = adapter or lora_adapter()
    memories: dict[int, State] = {}
    state = algorithm.init(initial)
    for number in range(rounds):
        info = round_info(number, sampled(number), rounds, ranks=ranks)
        updates = train_round(algorithm, state, memories, info, initial)
        after = algorithm.aggregate(state, updates, info)
        yield state, updates, after, info
        state = after


class ToyFleet:
    """A fleet of toy clients that remember. `alter(round, updates)` may replace a round's updates.

    `seen` has the info and messages of every round, and `committed` the rounds that were committed.
    """

    def __init__(self, algorithm: Algorithm, alter: Callable[[int, list[Update]], list[Update]] | None = None) -> None:
        self.algorithm, self.alter = algorithm, alter or (lambda _, updates: updates)
        self.memory: dict[int, State] = {}
        self.before: dict[int, State] = {}
        self.seen: list[tuple[RoundInfo, Mapping[int, State]]] = []
        self.committed: list[int] = []

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        self.seen.append((info, messages))
        updates = []
        for client in info.sampled:
            memory = self.before[client] = self.memory.get(client, {})
            message = messages[client]
            update, self.memory[client] = train_toy_client(self.algorithm, client, message, memory, info, lora_adapter())
            updates.append(update)
        return self.alter(info.round, updates)

    def forget(self, round: int, clients: Sequence[int]) -> None:
        for client in clients:
            self.memory[client] = self.before[client]

    def commit(self, round: int) -> None:
        self.committed.append(round)

    def personal(self, client: int, message: State, done: int) -> Tensors:
        return complete(message, self.memory.get(client, {}), lora_adapter())["adapter"]
