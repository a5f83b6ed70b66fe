"""The one round loop: sample clients, let a fleet train them, refuse what cannot be used, aggregate, record, go on.

A fleet only answers "train these clients from this state"; whether in this process or over a network is its affair. The
loop is a generator: whoever drives it evaluates, writes to disk, and may stop after any round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedmllm.algorithms import Algorithm, RoundInfo, Update
from fedmllm.config import TrainTable
from fedmllm.rng import stream
from fedmllm.tensors import State, Tensors, nbytes, problem_with, select


class Fleet(Protocol):
    """`train` answers with the updates of the clients in `info.sampled`, in any order. `commit(round)` says that the
    server's state after that round is safe: client memory from before it may go."""

    def train(self, info: RoundInfo, received: State, lr: float) -> Sequence[Update]: ...

    def commit(self, round: int) -> None: ...


class TooFewUpdates(RuntimeError):  # noqa: N818 (it says what happened)
    """A round brought fewer usable updates than `train.min_updates`."""


@dataclass(frozen=True)
class Plan:
    """`clients` are the ids of all clients; `per_round` of them are sampled each round without replacement."""

    clients: tuple[int, ...]
    per_round: int
    rounds: int
    lr: float
    schedule: str
    min_updates: int
    seed: int

    @classmethod
    def of(cls, train: TrainTable, clients: Sequence[int], seed: int) -> Plan:
        ids = tuple(clients)
        per_round = min(train.clients_per_round, len(ids))
        return cls(ids, per_round, train.rounds, train.lr, train.schedule, min(train.min_updates, per_round), seed)


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


def learning_rate(plan: Plan, round: int) -> float:
    """The local learning rate of a round, constant within it: lr · ½(1 + cos(π t / T)) or lr."""
    if plan.schedule == "constant":
        return plan.lr
    return plan.lr * 0.5 * (1 + math.cos(math.pi * round / plan.rounds))


def sample_clients(plan: Plan, round: int) -> tuple[int, ...]:
    """Drawn from the experiment's seed and the round's number, so that a resumed run draws the same."""
    chosen = stream(plan.seed, "sampling", round).choice(len(plan.clients), size=plan.per_round, replace=False)
    return tuple(sorted(plan.clients[int(i)] for i in chosen))


def usable(
    updates: Sequence[Update], reference: State, sampled: Sequence[int]
) -> tuple[list[Update], list[dict[str, str | int]]]:
    """The updates that can be aggregated, and for each other one its client and why it was refused."""
    good: list[Update] = []
    refused: list[dict[str, str | int]] = []
    for update in sorted(updates, key=lambda u: u.client):
        why = None if update.client in sampled else "not sampled in this round"
        if why is None and (update.examples < 1 or update.steps < 1):
            why = "no examples"
        if why is None and update.groups.keys() != reference.keys():
            why = f"groups {sorted(update.groups)} instead of {sorted(reference)}"
        for group in sorted(reference) if why is None else ():
            why = why or problem_with(update.groups[group], reference[group])
        if why is None and any(update.client == other.client for other in good):
            why = "a second update in the same round"
        if why is None:
            good.append(update)
        else:
            refused.append({"client": update.client, "why": why})
    return good, refused


def federate(
    algorithm: Algorithm, fleet: Fleet, plan: Plan, adapter: Tensors, resume: tuple[int, State] | None = None
) -> Iterator[tuple[RoundRecord, State]]:
    """Yield each round's record and the server's state after it.

    `resume` is (rounds already done, the server's state after them). Raises TooFewUpdates where a round cannot go on.
    """
    done, state = resume if resume else (0, algorithm.init(adapter))
    for round in range(done, plan.rounds):  # noqa: A001 (the field's word)
        began = time.monotonic()
        info = RoundInfo(round, plan.rounds, len(plan.clients), sample_clients(plan, round), plan.seed)
        received = select(state, algorithm.send)
        lr = learning_rate(plan, round)
        updates = fleet.train(info, received, lr)
        good, refused = usable(updates, algorithm.uploads(state), info.sampled)
        if len(good) < plan.min_updates:
            reasons = "; ".join(f"client {r['client']}: {r['why']}" for r in refused) or "no client answered"
            raise TooFewUpdates(
                f"round {round}: {len(good)} usable updates, train.min_updates = {plan.min_updates} ({reasons})"
            )
        state = algorithm.aggregate(state, good, info)
        examples = sum(u.examples for u in good)
        up: dict[str, int] = {}
        for update in updates:
            for group, tensors in update.groups.items():
                up[group] = up.get(group, 0) + nbytes(tensors)
        yield (
            RoundRecord(
                round=round,
                lr=lr,
                sampled=list(info.sampled),
                examples=examples,
                steps=sum(u.steps for u in good),
                loss=sum(u.metrics.get("loss", 0.0) * u.examples for u in good) / examples,
                bytes_down={group: nbytes(tensors) * len(info.sampled) for group, tensors in received.items()},
                bytes_up=up,
                refused=refused,
                seconds=time.monotonic() - began,
                padding=sum(u.metrics.get("padding", 0.0) * u.examples for u in good) / examples,
            ),
            state,
        )
        fleet.commit(round)
