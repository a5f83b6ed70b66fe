"""What a federation is: where its clients train, who takes part in a round, and the record of a round."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fedmllm.algorithms import AdapterInfo, RoundInfo, Update
from fedmllm.algorithms.asynchronous import Asynchronous
from fedmllm.algorithms.combining import Combiner
from fedmllm.config import TrainTable
from fedmllm.rng import stream
from fedmllm.simulation.clock import Simulation
from fedmllm.simulation.selection import Policy
from fedmllm.tensors import State, Tensors


class Fleet(Protocol):
    """Where clients train."""

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        """The updates of the clients in `messages`, in any order. `messages` has what each client is sent; its clients are
        those of `info.sampled`, or the ones among them that this fleet serves."""

    def forget(self, round: int, clients: Sequence[int]) -> None:
        """Delete what these clients remembered in that round, because their updates were refused."""

    def commit(self, round: int) -> None:
        """The server's states after that round and the next are saved, so client memory from earlier rounds may be deleted.
        Called two rounds late."""

    def personal(self, client: int, message: State, done: int) -> Tensors:
        """The adapter of a client that keeps part of it, after `done` rounds and with this message."""


class TooFewUpdates(RuntimeError):  # noqa: N818 (named after the event, as StopIteration is)
    """A round had fewer valid updates than `train.min_updates`."""


@dataclass(frozen=True)
class FederationPlan:
    """`clients` has the ids of all clients that may take part; `per_round` of them are sampled each round without replacement.
    If `poisson`, each takes part with the probability that makes `per_round` the expected number, independently of the others.

    `ranks` has the LoRA rank of each client if ranks differ, else it is empty. The learning rate of the first round is
    multiplied by `first_round_factor`. `remedy` says which settings make the server's step smaller, with their values, for the
    message of a step that overflows. Updates are screened with `max_norm_ratio`, `declared` and `per_step` (see `screen`); then
    `combine`, if set, replaces the valid ones. With a `simulation`, rounds take simulated time, and clients may fail;
    `over_select` is the share of clients that are sampled on top, of whom the first `per_round` to answer are used. A `policy`
    chooses the clients in place of the uniform draw. If `asynchronous`, a round is a step of the server after enough updates
    have arrived, and `per_round` clients train at the same time.
    """

    clients: Sequence[int]
    per_round: int
    rounds: int
    lr: float
    schedule: str
    min_updates: int
    seed: int
    adapter: AdapterInfo = field(default_factory=AdapterInfo)
    ranks: Mapping[int, int] = field(default_factory=dict)
    first_round_factor: float = 1.0
    remedy: str = ""
    max_norm_ratio: float = 100.0
    declared: Sequence[int] = ()
    per_step: Sequence[int] = ()
    combine: Combiner | None = None
    poisson: bool = False
    simulation: Simulation | None = None
    over_select: float = 0.0
    policy: Policy | None = None
    asynchronous: Asynchronous | None = None

    @property
    def draws(self) -> int:
        """The number of clients that are sampled in a round, unless `poisson`."""
        return min(len(self.clients), math.ceil(round(self.per_round * (1 + self.over_select), 9)))

    def info(self, round: int, sampled: Sequence[int], steps: Mapping[int, int] | None = None) -> RoundInfo:
        """The info of a round in which `sampled` take part, some of them with so many `steps` at most."""
        ranks = {client: self.ranks[client] for client in sampled if client in self.ranks}
        lr = learning_rate(self, round)
        ids, adapter = tuple(sampled), self.adapter
        return RoundInfo(round, self.rounds, len(self.clients), ids, self.seed, adapter, ranks, lr=lr, steps=steps or {})

    @classmethod
    def of(
        cls,
        train: TrainTable,
        clients: Sequence[int],
        seed: int,
        adapter: AdapterInfo | None = None,
        ranks: Mapping[int, int] | None = None,
    ) -> FederationPlan:
        """The plan of the experiment's [train] table, with `clients_per_round` and `min_updates` limited to the number of
        clients."""
        ids = clients if isinstance(clients, range) else tuple(clients)
        per_round = min(train.clients_per_round, len(ids))
        min_updates = min(train.min_updates, per_round)
        info = adapter or AdapterInfo()
        settings = (train.rounds, train.lr, train.schedule, min_updates, seed, info, ranks or {}, train.first_round_factor)
        return cls(ids, per_round, *settings, max_norm_ratio=train.max_norm_ratio)


@dataclass(frozen=True)
class RoundRecord:
    """The record of one round. `loss` and `padding` are means over the examples of the valid updates; without any, the loss is
    NaN. Bytes are counted from the tensors that were sent, by group, and summed over all sampled clients."""

    round: int
    lr: float
    sampled: list[int]
    examples: int
    steps: int
    loss: float
    bytes_down: dict[str, int]
    bytes_up: dict[str, int]
    parts_down: dict[str, int]
    """The same bytes by the part of the model that the tensors belong to: "text", "vision", "projector", and "other" for all
    that travels under secure aggregation, in which masks and keys belong to none."""
    parts_up: dict[str, int]
    refused: list[dict[str, str | int]]
    seconds: float
    padding: float = 0.0
    metrics: dict[str, dict[str, object]] = field(default_factory=dict)
    kept: dict[int, float] = field(default_factory=dict)
    """client -> the share of its update that robust aggregation used, from 0 to 1."""
    privacy: dict[str, float] = field(default_factory=dict)
    clock: dict[str, Any] = field(default_factory=dict)
    """Simulated seconds: when the round "began", how many it took, and what each of its "clients" needs; those of them that
    were "lost", whom `refused` has as well; and the share of its steps that each client made which did "partial" work."""
    stopped: bool = False
    """No further round follows, because the score no longer improved."""


def learning_rate(plan: FederationPlan, round: int) -> float:
    """The local learning rate of a round, which is constant within the round: lr · ½(1 + cos(π t / T)), or lr; in round 0
    multiplied by the plan's factor."""
    if round == 0:  # where the cosine is 1
        return plan.lr * plan.first_round_factor
    return plan.lr if plan.schedule == "constant" else plan.lr * 0.5 * (1 + math.cos(math.pi * round / plan.rounds))


def sample_clients(plan: FederationPlan, round: int, state: State | None = None) -> tuple[int, ...]:
    """The clients of a round, sorted; there may be none if `plan.poisson`. The draw depends on the experiment's seed, the round
    and, with a policy, the server's state, so a resumed run draws the same clients."""
    indices: Sequence[int]
    rng, count = stream(plan.seed, "sampling", round), len(plan.clients)
    if plan.poisson:
        indices = np.flatnonzero(rng.random(count) < plan.per_round / count).tolist()
    elif plan.policy is not None:
        return tuple(sorted(plan.policy.choose(rng, plan.draws, state or {})))
    else:
        indices = rng.choice(count, size=plan.draws, replace=False).tolist()
    return tuple(sorted(plan.clients[i] for i in indices))


def participants(plan: FederationPlan, start: int = 0) -> list[int]:
    """All clients that may take part from the round `start` on; known in advance, because a draw depends on the seed and the
    round only. A policy, or chance in an asynchronous federation, may choose any client."""
    if plan.policy is not None or plan.asynchronous is not None:
        return list(plan.clients) if start < plan.rounds else []
    return sorted({client for number in range(start, plan.rounds) for client in sample_clients(plan, number)})


def sum_groups(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of several counts by group."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)
