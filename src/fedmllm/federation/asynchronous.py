"""The asynchronous loop: clients train on the model that they were sent while the server goes on.

`plan.per_round` clients train at the same time. A client that arrives is replaced by another once everybody who arrives at the
same instant is counted. A client's randomness depends on the step that it started in, so nobody starts twice in one step, and a
step uses one update of each client at most. What is on its way is part of the server's state. In this simulation a client is
trained when it is sent the model, and its update is kept until the clock says that it arrives.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedmllm.algorithms import Algorithm, Update
from fedmllm.algorithms.asynchronous import Asynchronous
from fedmllm.algorithms.combining import Combined
from fedmllm.federation.plan import FederationPlan, Fleet, RoundRecord
from fedmllm.federation.step import aggregate_valid, record_of
from fedmllm.rng import stream
from fedmllm.simulation.clock import Simulation
from fedmllm.simulation.flights import Flight, Traffic, first_to_arrive, without_traffic
from fedmllm.tensors import State


def asynchronous_step(
    algorithm: Algorithm, fleet: Fleet, plan: FederationPlan, state: State, version: int
) -> tuple[RoundRecord, State]:
    """The record of the server's step `version`, and the state after it. Its `sampled` are the clients that arrived."""
    method, simulation = plan.asynchronous, plan.simulation
    assert method is not None
    assert simulation is not None, "asynchronous federations have a clock"
    wall, traffic, own = time.monotonic(), Traffic.of(state), without_traffic(state)
    began = traffic.now
    rng, started, messages = stream(plan.seed, "sampling", version), set[int](), dict[int, State]()
    arrived: list[Flight] = []
    while sum(flight.trained for flight in arrived) < method.buffer:
        if all(flight.arrives > traffic.now for flight in traffic.flights):
            answered = {flight.client for flight in arrived}
            clients = _next_clients(plan, rng, traffic, started | answered)
            messages |= _send(clients, algorithm, fleet, plan, simulation, own, version, traffic)
            started |= set(clients)
        if not traffic.flights:
            break  # nobody is left to ask, because too many dropped out
        flight = first_to_arrive(traffic.flights)
        traffic.flights.remove(flight)
        traffic.now = max(traffic.now, flight.arrives)
        arrived.append(flight)
    after, record = _step(algorithm, fleet, plan, method, own, version, arrived, messages, traffic)
    clients_on_clock = {flight.client: _figures(flight, version) for flight in sorted(arrived, key=lambda f: f.client)}
    lost = sorted(flight.client for flight in arrived if flight.update is None)
    clock = {"began": began, "seconds": traffic.now - began, "clients": clients_on_clock, "lost": lost}
    traffic.forget()
    record = replace(record, clock=clock, seconds=time.monotonic() - wall)
    return record, {**after, **traffic.to_state()}


def _figures(flight: Flight, version: int) -> dict[str, Any]:
    return {"compute": flight.compute, "transfer": flight.transfer, "staleness": version - flight.version}


def _next_clients(plan: FederationPlan, rng: np.random.Generator, traffic: Traffic, others: set[int]) -> list[int]:
    """As many clients as may train on top of those that do, sorted; none of `others`."""
    busy = others | {flight.client for flight in traffic.flights}
    free = [client for client in plan.clients if client not in busy]
    count = min(plan.per_round - len(traffic.flights), len(free))
    return sorted(free[i] for i in rng.choice(len(free), size=count, replace=False).tolist()) if count > 0 else []


def _send(
    clients: list[int],
    algorithm: Algorithm,
    fleet: Fleet,
    plan: FederationPlan,
    simulation: Simulation,
    state: State,
    version: int,
    traffic: Traffic,
) -> dict[int, State]:
    """Send the model to these clients, whose flights are added to the traffic; the messages."""
    if not clients:
        return {}
    info = plan.info(version, clients)
    messages = {client: algorithm.message(state, client, info) for client in clients}
    costs = {client: simulation.costs(client, algorithm, state, messages[client], info) for client in clients}
    staying = plan.info(version, [client for client in clients if not simulation.drops_out(client, version)])
    updates = {u.client: u for u in fleet.train(staying, {client: messages[client] for client in staying.sampled})}
    for client, (compute, transfer) in costs.items():
        arrives = traffic.now + compute + transfer
        traffic.flights.append(Flight(client, version, arrives, compute, transfer, updates.get(client)))
    traffic.sent[version] = state["adapter"]
    return messages


def _step(
    algorithm: Algorithm,
    fleet: Fleet,
    plan: FederationPlan,
    method: Asynchronous,
    state: State,
    version: int,
    arrived: list[Flight],
    messages: Mapping[int, State],
    traffic: Traffic,
) -> tuple[State, RoundRecord]:
    """The state after a step with the updates that arrived, and its record without the clock."""
    updates = [
        method.rebased(flight.update, version - flight.version, state["adapter"], traffic.sent[flight.version])
        for flight in arrived
        if flight.update is not None
    ]
    outcome: tuple[State, list[Update], list[dict[str, str | int]], Combined] = state, [], [], Combined([])
    if updates or plan.min_updates > 1:
        info = plan.info(version, sorted(update.client for update in updates))
        outcome = aggregate_valid(updates, algorithm, fleet, plan, state, info)
    after, valid, refused, combined = outcome
    refused = refused + [{"client": f.client, "why": "dropped out"} for f in arrived if f.update is None]
    refused.sort(key=lambda row: int(row["client"]))
    everybody = plan.info(version, sorted(flight.client for flight in arrived))
    return after, record_of(everybody, messages, updates, valid, refused, combined, 0.0)
