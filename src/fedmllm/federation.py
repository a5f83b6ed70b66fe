"""The round loop: sample clients, let a fleet train them, refuse invalid updates, aggregate, and record the round.

A fleet trains the clients that it is given from the states that it is given, in this process or over a network. The loop is a
generator: its caller evaluates, writes to disk, and may stop after any round.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from fedmllm.algorithms import AdapterInfo, Algorithm, RoundInfo, Update
from fedmllm.algorithms.combining import Combined, Combiner
from fedmllm.algorithms.screening import screen
from fedmllm.config import TrainTable
from fedmllm.errors import RunError
from fedmllm.rng import stream
from fedmllm.tensors import State, Tensors, bytes_by_group, not_finite


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
    """`clients` has the ids of all clients; `per_round` of them are sampled each round without replacement. If `poisson`, each
    takes part with the probability that makes `per_round` the expected number, independently of the others.

    `ranks` has the LoRA rank of each client if ranks differ, else it is empty. The learning rate of the first round is
    multiplied by `first_round_factor`. `remedy` says which settings make the server's step smaller, with their values, for the
    message of a step that overflows. Updates are screened with `max_norm_ratio` and `declared` (see `screen`); then `combine`,
    if set, replaces the valid ones.
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
    combine: Combiner | None = None
    poisson: bool = False

    def info(self, round: int, sampled: Sequence[int]) -> RoundInfo:
        """The info of a round in which `sampled` take part."""
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
    refused: list[dict[str, str | int]]
    seconds: float
    padding: float = 0.0
    metrics: dict[str, dict[str, object]] = field(default_factory=dict)
    kept: dict[int, float] = field(default_factory=dict)
    """client -> the share of its update that robust aggregation used, from 0 to 1."""
    privacy: dict[str, float] = field(default_factory=dict)


def learning_rate(plan: FederationPlan, round: int) -> float:
    """The local learning rate of a round, which is constant within the round: lr · ½(1 + cos(π t / T)), or lr; in round 0
    multiplied by the plan's factor."""
    if round == 0:  # where the cosine is 1
        return plan.lr * plan.first_round_factor
    return plan.lr if plan.schedule == "constant" else plan.lr * 0.5 * (1 + math.cos(math.pi * round / plan.rounds))


def sample_clients(plan: FederationPlan, round: int) -> tuple[int, ...]:
    """The clients of a round, sorted; there may be none if `plan.poisson`. The draw depends on the experiment's seed and the
    round only, so a resumed run draws the same clients."""
    rng, count = stream(plan.seed, "sampling", round), len(plan.clients)
    if plan.poisson:
        indices = np.flatnonzero(rng.random(count) < plan.per_round / count)
    else:
        indices = rng.choice(count, size=plan.per_round, replace=False)
    return tuple(sorted(plan.clients[int(i)] for i in indices))


def participants(plan: FederationPlan) -> list[int]:
    """All clients that take part in any round; known in advance, because a draw depends on the seed and the round only."""
    return sorted({client for number in range(plan.rounds) for client in sample_clients(plan, number)})


def sum_groups(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of several counts by group."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def _aggregate(
    updates: Sequence[Update], algorithm: Algorithm, fleet: Fleet, plan: FederationPlan, state: State, info: RoundInfo
) -> tuple[State, list[Update], list[dict[str, str | int]], Combined]:
    """The state after a round with these updates, the valid ones, why the others were refused, and what was aggregated. Raises
    TooFewUpdates, or RunError if the server's step overflows."""
    valid, refused = screen(updates, algorithm, state, info, plan.max_norm_ratio, plan.declared)
    for refusal in refused:
        if "NaN or infinity" in str(refusal["why"]):
            refusal["why"] = f"{refusal['why']}; its training diverged: lower train.lr, which was {plan.lr:g}"
    # Before the round is recorded: a client must not remember a control variate whose update was not used, nor a NaN.
    fleet.forget(info.round, sorted(set(info.sampled) - {u.client for u in valid}))
    if len(valid) < plan.min_updates:
        reasons = "; ".join(f"client {r['client']}: {r['why']}" for r in refused) or "no client answered"
        raise TooFewUpdates(
            f"round {info.round}: {len(valid)} usable updates, train.min_updates = {plan.min_updates} ({reasons})"
        )
    combined = plan.combine(valid, algorithm, state, info) if plan.combine else Combined(valid)
    after = {**algorithm.aggregate(state, combined.updates, info), **combined.state}
    if name := not_finite(after):
        kept = f"the state after round {info.round - 1} is kept" if info.round else "nothing was trained before"
        raise RunError(
            f"round {info.round}: the server's step overflowed (NaN or infinity in {name!r}, from finite updates); "
            f"{plan.remedy or f'lower train.lr = {plan.lr}'}, and start a new run ({kept})."
        )
    return after, valid, refused, combined


def _record(
    info: RoundInfo,
    messages: Mapping[int, State],
    updates: Sequence[Update],
    valid: Sequence[Update],
    refused: list[dict[str, str | int]],
    combined: Combined,
    seconds: float,
) -> RoundRecord:
    examples = sum(u.examples for u in valid)

    def mean(metric: str) -> float:
        return sum(u.metrics.get(metric, 0.0) * u.examples for u in valid) / examples if examples else math.nan

    reported = {update.client: update.travelled for update in updates if update.travelled}
    down = (reported[client][0] if client in reported else bytes_by_group(state) for client, state in messages.items())
    up = (update.travelled[1] if update.travelled else bytes_by_group(update.groups) for update in updates)
    return RoundRecord(
        round=info.round,
        lr=info.lr,
        sampled=list(info.sampled),
        examples=examples,
        steps=sum(u.steps for u in valid),
        loss=mean("loss"),
        bytes_down=sum_groups(down),
        bytes_up=sum_groups(up),
        refused=refused,
        seconds=seconds,
        padding=mean("padding") if examples else 0.0,
        kept=dict(combined.kept),
        privacy=dict(combined.privacy),
    )


def federate(
    algorithm: Algorithm, fleet: Fleet, plan: FederationPlan, adapter: Tensors, resume: tuple[int, State] | None = None
) -> Iterator[tuple[RoundRecord, State]]:
    """Yield each round's record and the server's state after it.

    A caller that asks for round t + 1 has saved the state after round t − 1: the state after round t may still be being
    written while clients train. `resume` is (rounds already done, the server's state after them). Raises TooFewUpdates if a
    round has too few valid updates, RunError if a round's aggregate is not finite.
    """
    done, state = resume if resume else (0, algorithm.init(adapter))
    for round in range(done, plan.rounds):  # noqa: A001 (the standard term)
        began = time.monotonic()
        info = plan.info(round, sample_clients(plan, round))
        messages = {client: algorithm.message(state, client, info) for client in info.sampled}
        updates = fleet.train(info, messages)
        state, valid, refused, combined = _aggregate(updates, algorithm, fleet, plan, state, info)
        yield _record(info, messages, updates, valid, refused, combined, time.monotonic() - began), state
        # Not round − 1: a damaged checkpoint is replaced by the one before, which needs the memory of an earlier round.
        if round > done + 1:
            fleet.commit(round - 2)


def each_alone(
    algorithm: Algorithm, fleet: Fleet, plan: FederationPlan, adapters: Mapping[int, Tensors]
) -> Iterator[dict[int, tuple[RoundRecord, State]]]:
    """Run a separate federation of one client for each of `adapters`, all in step, so that a fleet may train the clients in one
    pass.

    After each round, yield for each client what `federate` yields; the round's seconds are divided equally. Raises
    TooFewUpdates if a client's update is not valid, RunError if an aggregate is not finite.
    """
    states = {client: algorithm.init(adapter) for client, adapter in adapters.items()}
    plans = {client: replace(plan, clients=(client,), per_round=1, min_updates=1) for client in adapters}
    for round in range(plan.rounds):  # noqa: A001 (the standard term)
        began = time.monotonic()
        infos = {client: own_plan.info(round, (client,)) for client, own_plan in plans.items()}
        messages = {client: algorithm.message(states[client], client, info) for client, info in infos.items()}
        updates = fleet.train(replace(plan, clients=tuple(adapters)).info(round, tuple(adapters)), messages)
        results = {}
        for client, info in infos.items():
            own_updates = [update for update in updates if update.client == client]
            outcome = _aggregate(own_updates, algorithm, fleet, plans[client], states[client], info)
            seconds = (time.monotonic() - began) / len(adapters)
            own_message = {client: messages[client]}
            states[client] = outcome[0]
            results[client] = _record(info, own_message, own_updates, *outcome[1:], seconds), states[client]
        yield results
