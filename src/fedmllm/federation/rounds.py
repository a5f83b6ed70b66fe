"""The round loop: sample clients, let a fleet train them, refuse invalid updates, aggregate, and record the round.

A fleet trains the clients that it is given from the states that it is given, in this process or over a network. The loop is a
generator: its caller evaluates, writes to disk, and may stop after any round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from fedmllm.algorithms import Algorithm, Update
from fedmllm.algorithms.combining import Combined
from fedmllm.federation.asynchronous import asynchronous_step
from fedmllm.federation.plan import FederationPlan, Fleet, RoundRecord, sample_clients
from fedmllm.federation.step import aggregate_valid, record_of
from fedmllm.tensors import State, Tensors


def _round(algorithm: Algorithm, fleet: Fleet, plan: FederationPlan, state: State, round: int) -> tuple[RoundRecord, State]:
    """A round's record and the state after it. On a virtual clock, only clients that answer in time are trained; if nobody
    does, the state stays as it is, unless `min_updates` asks for more than one."""
    began = time.monotonic()
    info = plan.info(round, sample_clients(plan, round, state))
    messages = {client: algorithm.message(state, client, info) for client in info.sampled}
    needed = len(messages) if plan.poisson else plan.per_round
    timed = plan.simulation.time(algorithm, state, messages, info, needed) if plan.simulation else None
    used = plan.info(round, timed.used, timed.steps) if timed else info
    updates = fleet.train(used, {client: messages[client] for client in used.sampled})
    outcome: tuple[State, list[Update], list[dict[str, str | int]], Combined] = state, [], [], Combined([])
    if used.sampled or plan.poisson or plan.min_updates > 1:
        outcome = aggregate_valid(updates, algorithm, fleet, plan, state, used)
    after, valid, refused, combined = outcome
    refused = refused + [{"client": client, "why": why} for client, why in (timed.lost if timed else {}).items()]
    refused.sort(key=lambda row: int(row["client"]))
    record = record_of(info, messages, updates, valid, refused, combined, time.monotonic() - began)
    if plan.policy:
        after = {**after, **plan.policy.learned(state, valid)}
    return (replace(record, clock=timed.to_json()), {**after, **timed.state}) if timed else (record, after)


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
        step = _round if plan.asynchronous is None else asynchronous_step
        record, state = step(algorithm, fleet, plan, state, round)
        yield record, state
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
            outcome = aggregate_valid(own_updates, algorithm, fleet, plans[client], states[client], info)
            seconds = (time.monotonic() - began) / len(adapters)
            own_message = {client: messages[client]}
            states[client] = outcome[0]
            results[client] = record_of(info, own_message, own_updates, *outcome[1:], seconds), states[client]
        yield results
