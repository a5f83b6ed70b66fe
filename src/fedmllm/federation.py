"""The one round loop: sample clients, let a fleet train them, refuse what cannot be used, aggregate, record, go on.

A fleet only answers "train these clients from this state"; whether in this process or over a network is its affair. The
loop is a generator: whoever drives it evaluates, writes to disk, and may stop after any round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from fedmllm.algorithms import AdapterInfo, Algorithm, RoundInfo, Update
from fedmllm.config import TrainTable
from fedmllm.rng import stream
from fedmllm.tensors import State, Tensors, bytes_by_group, problem_with


class Fleet(Protocol):
    """`train` answers with the updates of the clients in `messages`, which has what each is sent, in any order; they are all
    that `info.sampled` names, or those of them that this fleet serves.
    `forget(round, clients)` says that their updates were refused: what they remember of that round must go with them.
    `commit(round)` says that the server's state after that round is safe, and comes one round late: client memory from
    before it may go.
    `personal` is the adapter of a client that keeps part of it, after `done` rounds and with this message."""

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]: ...

    def forget(self, round: int, clients: Sequence[int]) -> None: ...

    def commit(self, round: int) -> None: ...

    def personal(self, client: int, message: State, done: int) -> Tensors: ...


class TooFewUpdates(RuntimeError):  # noqa: N818 (it says what happened)
    """A round brought fewer usable updates than `train.min_updates`."""


@dataclass(frozen=True)
class FederationPlan:
    """`clients` are the ids of all clients; `per_round` of them are sampled each round without replacement.

    `ranks` has the LoRA rank of each client where they differ, and is empty where they do not.
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

    def info(self, round: int, sampled: Sequence[int]) -> RoundInfo:
        """What the algorithm is told of a round in which `sampled` take part."""
        ranks = {client: self.ranks[client] for client in sampled if client in self.ranks}
        lr = learning_rate(self, round)
        return RoundInfo(round, self.rounds, len(self.clients), tuple(sampled), self.seed, self.adapter, ranks, lr=lr)

    @classmethod
    def of(
        cls,
        train: TrainTable,
        clients: Sequence[int],
        seed: int,
        adapter: AdapterInfo | None = None,
        ranks: Mapping[int, int] | None = None,
    ) -> FederationPlan:
        ids = clients if isinstance(clients, range) else tuple(clients)
        per_round = min(train.clients_per_round, len(ids))
        enough = min(train.min_updates, per_round)
        info = adapter or AdapterInfo()
        return cls(ids, per_round, train.rounds, train.lr, train.schedule, enough, seed, info, ranks or {})


@dataclass(frozen=True)
class RoundRecord:
    """What one round did; bytes are counted from the tensors that travel, by group and over all sampled clients."""

    round: int
    lr: float
    sampled: list[int]
    examples: int
    steps: int
    loss: float
    bytes_down: dict[str, int]
    bytes_up: dict[str, int]
    refused: list[dict[str, str | int]]
    seconds: float
    padding: float = 0.0
    metrics: dict[str, dict[str, object]] = field(default_factory=dict)


def learning_rate(plan: FederationPlan, round: int) -> float:
    """The local learning rate of a round, constant within it: lr · ½(1 + cos(π t / T)) or lr."""
    if plan.schedule == "constant":
        return plan.lr
    return plan.lr * 0.5 * (1 + math.cos(math.pi * round / plan.rounds))


def sample_clients(plan: FederationPlan, round: int) -> tuple[int, ...]:
    """Drawn from the experiment's seed and the round's number, so that a resumed run draws the same."""
    chosen = stream(plan.seed, "sampling", round).choice(len(plan.clients), size=plan.per_round, replace=False)
    return tuple(sorted(plan.clients[int(i)] for i in chosen))


def participants(plan: FederationPlan) -> list[int]:
    """All clients that will take part in some round; known beforehand, as each draw depends on seed and round alone."""
    return sorted({client for number in range(plan.rounds) for client in sample_clients(plan, number)})


def usable(
    updates: Sequence[Update], algorithm: Algorithm, state: State, info: RoundInfo
) -> tuple[list[Update], list[dict[str, str | int]]]:
    """The updates that can be aggregated, and for each other one its client and why it was refused."""
    good: list[Update] = []
    refused: list[dict[str, str | int]] = []
    for update in sorted(updates, key=lambda u: u.client):
        why = _problem(update, algorithm, state, info)
        if why is None and any(update.client == other.client for other in good):
            why = "a second update in the same round"
        if why is None:
            good.append(update)
        else:
            refused.append({"client": update.client, "why": why})
    return good, refused


def _problem(update: Update, algorithm: Algorithm, state: State, info: RoundInfo) -> str | None:
    if update.client not in info.sampled:
        return "not sampled in this round"
    if update.problem:
        return update.problem
    if update.examples < 1 or update.steps < 1:
        return "no examples"
    reference = algorithm.uploads(state, update.client, info)
    if update.groups.keys() != reference.keys():
        return f"groups {sorted(update.groups)} instead of {sorted(reference)}"
    for group in sorted(reference):
        if why := problem_with(update.groups[group], reference[group]):
            return why
    return algorithm.refuse(update, state, info)


def _travelled(messages: Mapping[int, State], updates: Sequence[Update]) -> tuple[dict[str, int], dict[str, int]]:
    """The bytes that went down and came up, by group."""
    told = {update.client: update.travelled for update in updates if update.travelled}
    down = (told[client][0] if client in told else bytes_by_group(state) for client, state in messages.items())
    up = (update.travelled[1] if update.travelled else bytes_by_group(update.groups) for update in updates)
    return sum_groups(down), sum_groups(up)


def sum_groups(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of several counts by group."""
    total: dict[str, int] = {}
    for count in counts:
        for group, number in count.items():
            total[group] = total.get(group, 0) + number
    return total


def _absorb(
    updates: Sequence[Update], algorithm: Algorithm, fleet: Fleet, plan: FederationPlan, state: State, info: RoundInfo
) -> tuple[State, list[Update], list[dict[str, str | int]]]:
    """The state after a round with these updates, those it was made of, and why others were refused. Raises TooFewUpdates."""
    good, refused = usable(updates, algorithm, state, info)
    # Before the round is recorded: a control variate whose update never arrived must not outlive it, nor a NaN.
    fleet.forget(info.round, sorted(set(info.sampled) - {u.client for u in good}))
    if len(good) < plan.min_updates:
        reasons = "; ".join(f"client {r['client']}: {r['why']}" for r in refused) or "no client answered"
        raise TooFewUpdates(
            f"round {info.round}: {len(good)} usable updates, train.min_updates = {plan.min_updates} ({reasons})"
        )
    return algorithm.aggregate(state, good, info), good, refused


def _record(
    good: Sequence[Update],
    refused: list[dict[str, str | int]],
    info: RoundInfo,
    travelled: tuple[dict[str, int], dict[str, int]],
    seconds: float,
) -> RoundRecord:
    """`travelled` are the bytes down and up."""
    examples = sum(u.examples for u in good)
    return RoundRecord(
        round=info.round,
        lr=info.lr,
        sampled=list(info.sampled),
        examples=examples,
        steps=sum(u.steps for u in good),
        loss=sum(u.metrics.get("loss", 0.0) * u.examples for u in good) / examples,
        bytes_down=travelled[0],
        bytes_up=travelled[1],
        refused=refused,
        seconds=seconds,
        padding=sum(u.metrics.get("padding", 0.0) * u.examples for u in good) / examples,
    )


def federate(
    algorithm: Algorithm, fleet: Fleet, plan: FederationPlan, adapter: Tensors, resume: tuple[int, State] | None = None
) -> Iterator[tuple[RoundRecord, State]]:
    """Yield each round's record and the server's state after it.

    Asking for round t + 1 says that the state after round t − 1 is safe: one may be written while clients train.
    `resume` is (rounds already done, the server's state after them). Raises TooFewUpdates where a round cannot go on.
    """
    done, state = resume if resume else (0, algorithm.init(adapter))
    for round in range(done, plan.rounds):  # noqa: A001 (the field's word)
        began = time.monotonic()
        info = plan.info(round, sample_clients(plan, round))
        messages = {client: algorithm.message(state, client, info) for client in info.sampled}
        updates = fleet.train(info, messages)
        state, good, refused = _absorb(updates, algorithm, fleet, plan, state, info)
        yield _record(good, refused, info, _travelled(messages, updates), time.monotonic() - began), state
        if round > done:
            fleet.commit(round - 1)


def each_alone(
    algorithm: Algorithm, fleet: Fleet, plan: FederationPlan, adapters: Mapping[int, Tensors]
) -> Iterator[dict[int, tuple[RoundRecord, State]]]:
    """As many federations of one client as there are `adapters`, side by side, so that a fleet may train them in one pass.

    Yield after each round what `federate` yields, for each client; the seconds are an equal share of what all took. Raises
    TooFewUpdates where a client's round brought nothing usable.
    """
    states = {client: algorithm.init(adapter) for client, adapter in adapters.items()}
    plans = {client: replace(plan, clients=(client,), per_round=1, min_updates=1) for client in adapters}
    for round in range(plan.rounds):  # noqa: A001 (the field's word)
        began = time.monotonic()
        infos = {client: own.info(round, (client,)) for client, own in plans.items()}
        messages = {client: algorithm.message(states[client], client, info) for client, info in infos.items()}
        updates = fleet.train(replace(plan, clients=tuple(adapters)).info(round, tuple(adapters)), messages)
        made = {}
        for client, info in infos.items():
            mine = [update for update in updates if update.client == client]
            states[client], good, refused = _absorb(mine, algorithm, fleet, plans[client], states[client], info)
            seconds = (time.monotonic() - began) / len(adapters)
            travelled = _travelled({client: messages[client]}, mine)
            made[client] = _record(good, refused, info, travelled, seconds), states[client]
        yield made
