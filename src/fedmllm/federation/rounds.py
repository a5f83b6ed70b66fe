"""The round loop: sample clients, let a fleet train them, refuse invalid updates, aggregate, and record the round.

A fleet trains the clients that it is given from the states that it is given, in this process or over a network. The loop is a
generator: its caller evaluates, writes to disk, and may stop after any round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from fedmllm.algorithms import Algorithm, RoundInfo, Update
from fedmllm.algorithms.combining import Combined
from fedmllm.algorithms.screening import screen
from fedmllm.errors import RunError
from fedmllm.federation.plan import FederationPlan, Fleet, RoundRecord, TooFewUpdates, sample_clients, sum_groups
from fedmllm.tensors import State, Tensors, bytes_by_group, not_finite


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


def _round(algorithm: Algorithm, fleet: Fleet, plan: FederationPlan, state: State, round: int) -> tuple[RoundRecord, State]:
    """A round's record and the state after it. On a virtual clock, only clients that answer in time are trained; if nobody
    does, the state stays as it is, unless `min_updates` asks for more than one."""
    began = time.monotonic()
    info = plan.info(round, sample_clients(plan, round, state))
    messages = {client: algorithm.message(state, client, info) for client in info.sampled}
    needed = len(messages) if plan.poisson else plan.per_round
    timed = plan.simulation.time(algorithm, state, messages, info, needed) if plan.simulation else None
    used = plan.info(round, timed.used) if timed else info
    updates: Sequence[Update] = ()
    outcome: tuple[State, list[Update], list[dict[str, str | int]], Combined] = state, [], [], Combined([])
    if used.sampled or plan.poisson or plan.min_updates > 1:
        updates = fleet.train(used, {client: messages[client] for client in used.sampled})
        outcome = _aggregate(updates, algorithm, fleet, plan, state, used)
    after, valid, refused, combined = outcome
    refused = refused + [{"client": client, "why": why} for client, why in (timed.lost if timed else {}).items()]
    refused.sort(key=lambda row: int(row["client"]))
    record = _record(info, messages, updates, valid, refused, combined, time.monotonic() - began)
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
        record, state = _round(algorithm, fleet, plan, state, round)
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
            outcome = _aggregate(own_updates, algorithm, fleet, plans[client], states[client], info)
            seconds = (time.monotonic() - began) / len(adapters)
            own_message = {client: messages[client]}
            states[client] = outcome[0]
            results[client] = _record(info, own_message, own_updates, *outcome[1:], seconds), states[client]
        yield results
