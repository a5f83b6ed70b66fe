"""A federation of toy clients: it runs an algorithm's server half and client half without a model or data.

Client k minimises ½ ‖w − target_k‖² by plain gradient descent, under the algorithm's rule. `traffic` and the checks in
`fedmllm.testing` observe algorithms with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache

import torch

from fedmllm.algorithms.base import (
    AdapterInfo,
    Algorithm,
    ClientInfo,
    LocalResult,
    LocalRule,
    RoundInfo,
    Update,
    complete,
    own_adapter,
)
from fedmllm.algorithms.factors import A, B, best_factors, modules, principal_state, with_rank
from fedmllm.rng import stream
from fedmllm.tensors import State, Tensors, clone, flatten, zeros_like

LR = 0.1
CLIENTS = (0, 1, 3)
_SHOWS: tuple[Mapping[str, float], ...] = ({"image": 1.0, "text": 0.5}, {"image": 0.75}, {"text": 1.0}, {})
"""The shares of client k's samples that show a modality, modulo their number."""


def lora_adapter(layers: int = 6, rank: int = 2) -> Tensors:
    """An adapter with PEFT's names: A: (rank, 3) is random and B: (4, rank) is zero, as LoRA starts."""
    rng, adapter = stream(0, "lora_adapter"), {}
    for layer in range(layers):
        module = f"base_model.model.model.text_model.layers.{layer}.self_attn.q_proj"
        adapter[module + A] = torch.tensor(rng.normal(size=(rank, 3)), dtype=torch.float32)
        adapter[module + B] = torch.zeros(4, rank)
    return adapter


@cache
def principal() -> State:
    """`AdapterInfo.principal` of the toy adapter: its base weights (4, 3) are random."""
    rng = stream(0, "base_weights")
    weights = {m: torch.tensor(rng.normal(size=(4, 3)), dtype=torch.float32) for m in modules(lora_adapter())}
    return principal_state(weights, 2, 3.0 / 2)


def base_gradient(client: int) -> Tensors:
    """`LocalResult.base_gradient` of a toy client: factors of rank 2 of a random matrix (4, 3) for each base weight."""
    gradient: Tensors = {}
    for m in modules(lora_adapter()):
        b, a = best_factors(target(client, m, (4, 3)).double(), torch.eye(3, dtype=torch.float64), 2)
        gradient |= with_rank(m, a.float(), b.float(), 2)
    return gradient


_LAYER = {name: int(name.split(".")[5]) for name in lora_adapter()}
_MODALITY = {name: {0: "image", 1: "text"}[layer] for name, layer in _LAYER.items() if layer < 2}
ADAPTER_INFO = AdapterInfo(layers=6, layer=_LAYER, alpha=3.0, modality=_MODALITY, principal=principal, basis=lora_adapter)


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


@lru_cache(maxsize=4096)
def target(client: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The minimum of the client's loss for this tensor. Shared between calls, so it must not be modified."""
    return torch.tensor(stream(7, "target", client, name).normal(size=shape), dtype=torch.float32)


def steps_of(client: int) -> int:
    return 2 + client % 3


def examples_of(client: int) -> int:
    return 10 * (client + 1)


def per_step_of(client: int) -> int:
    """The examples of one step."""
    return -(-examples_of(client) // steps_of(client))


def local_sgd(client: int, received: Tensors, rule: LocalRule, lr: float = LR, most: int | None = None) -> LocalResult:
    """Train with plain gradient descent under a rule, in `most` steps at most, and report what local training on a model
    reports. All steps but the last have equally many examples."""
    if rule.probe is not None:
        probed = local_sgd(client, received, replace(rule, probe=None), lr, most)
        rule = replace(rule, probe=None, frozen=rule.probe(probed))
    lr *= rule.lr_factor
    w, gradients, losses = clone(received), zeros_like(received), []
    steps = steps_of(client) if most is None else min(most, steps_of(client))
    for step in range(steps):
        trained, start = ({name: side[name] for name in filter(rule.trainable, side)} for side in (w, received))
        penalty = rule.penalty(trained, start, step / steps) if rule.penalty is not None else {}
        losses.append(sum(0.5 * float((t - target(client, name, t.shape)).square().sum()) for name, t in w.items()))
        for name in filter(rule.trainable, w):
            g = w[name] - target(client, name, w[name].shape)
            gradients[name] += g / steps
            g = g + rule.proximal.get(name, 0.0) * (w[name] - received[name])
            if rule.offset is not None and name in rule.offset:
                g = g + rule.offset[name]
            if name in penalty:
                g = g + penalty[name]
            if rule.frozen is not None and name in rule.frozen:
                g = g * (1 - rule.frozen[name])
            w[name] = w[name] - lr * g
    return LocalResult(
        received=received,
        trained=w,
        mean_gradient=gradients if rule.observe_gradient else None,
        examples=min(examples_of(client), steps * per_step_of(client)),
        steps=steps,
        lr=lr,
        metrics={"loss": sum(losses) / len(losses), "padding": 0.0},
        loss_before=losses[0] if rule.observe_loss else None,
        base_gradient=base_gradient(client) if rule.observe_base else None,
    )


def train_clients(
    algorithm: Algorithm, messages: Mapping[int, State], memories: dict[int, State], info: RoundInfo, initial: Tensors
) -> list[Update]:
    """The updates of the clients that receive `messages`, as a fleet with a model would compute them; `memories` gets their
    new memories."""
    updates = []
    for client, message in messages.items():
        own_info = replace(info, client=ClientInfo(client, 0.25 * (client % 4), _SHOWS[client % 4]))
        memory = memories.get(client, {})
        received = complete(message, memory, initial)
        steps = info.steps.get(client)
        result = local_sgd(client, received["adapter"], algorithm.rule(received, memory, own_info), info.lr, steps)
        if own := algorithm.own(received, memory, own_info):
            result = replace(result, own=local_sgd(client, own.start, own.rule, info.lr, steps).trained)
        upload, memories[client] = algorithm.finish(result, received, memory, own_info)
        updates.append(Update(client, upload, result.examples, result.steps, result.metrics))
    return updates


def train_round(
    algorithm: Algorithm, state: State, memories: dict[int, State], info: RoundInfo, initial: Tensors | None = None
) -> list[Update]:
    """The updates of a round; `memories` gets the clients' new memories."""
    messages = {client: algorithm.message(state, client, info) for client in info.sampled}
    return train_clients(algorithm, messages, memories, info, initial or lora_adapter())


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
        self.before |= {client: self.memory.get(client, {}) for client in messages}
        return self.alter(info.round, train_clients(self.algorithm, messages, self.memory, info, lora_adapter()))

    def forget(self, round: int, clients: Sequence[int]) -> None:
        for client in clients:
            self.memory[client] = self.before.get(client, {})

    def commit(self, round: int) -> None:
        self.committed.append(round)

    def personal(self, client: int, message: State, done: int) -> Tensors:
        return own_adapter(message, self.memory.get(client, {}), lora_adapter())
