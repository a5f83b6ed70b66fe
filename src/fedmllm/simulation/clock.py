"""The virtual clock of synchronous rounds: how long each client takes, which ones answer in time, and when the round ends.

A client takes (bytes down / downlink) + (samples / speed) + (bytes up / uplink); the server's own work takes no time. A round
lasts until the last client has answered, or as many as it needs, or until the deadline. A client that drops out is waited for
until the deadline, or if there is none for as long as it would have taken. A client that is too slow for the deadline is lost,
or makes the optimizer steps that fit into the time that its transfers leave, if that is at least one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fedmllm.algorithms import Algorithm, RoundInfo
from fedmllm.config import Experiment
from fedmllm.rng import stream
from fedmllm.simulation.devices import Device, devices_of
from fedmllm.tensors import State, nbytes

GROUP = "clock"
"""The group of the server's state that holds the simulated time."""
DAY = 86_400.0


@dataclass(frozen=True)
class Timed:
    """A round on the clock, in seconds: `used` has the clients whose updates count, `lost` why the others' do not, `seconds`
    the length of the round, `clients` the time that each takes to "compute" and for "transfer". `steps` has the optimizer steps
    of those used clients that cannot make all of theirs, and `shares` which share of all they are."""

    used: tuple[int, ...]
    lost: Mapping[int, str]
    began: float
    seconds: float
    clients: Mapping[int, Mapping[str, float]]
    steps: Mapping[int, int] = field(default_factory=dict)
    shares: Mapping[int, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        partial = {"partial": dict(self.shares)} if self.shares else {}
        return {
            "began": self.began,
            "seconds": self.seconds,
            "clients": dict(self.clients),
            "lost": sorted(self.lost),
        } | partial

    @property
    def state(self) -> State:
        """What the server remembers."""
        return {GROUP: {"seconds": torch.tensor([self.began + self.seconds], dtype=torch.float64)}}


@dataclass(frozen=True)
class Simulation:
    """`devices` and `examples` have, by client, its device and the samples that it trains on in a round. A client that needs
    more than `deadline` seconds is not waited for. If the server `waits`, a round begins when a client can be reached.

    `epochs` has, by client, how often it passes over its data, and `per_step` the samples of an optimizer step, if late clients
    do part of their work; if they are empty, late clients are lost. Nobody waits for `excluded` clients to be reached."""

    seed: int
    devices: Sequence[Device]
    examples: Sequence[int]
    deadline: float = math.inf
    waits: bool = False
    epochs: Sequence[int] = ()
    per_step: Sequence[int] = ()
    excluded: Sequence[int] = ()

    @classmethod
    def of(cls, config: Experiment, sizes: Sequence[int], excluded: Sequence[int] = ()) -> Simulation | None:
        """The simulation that the experiment describes, with `sizes` samples by client; None if it describes no devices."""
        devices = devices_of(config.clients, len(sizes), config.seed)
        if not devices:
            return None
        train, tables = config.train, [config.train_of(client) for client in range(len(sizes))]
        epochs = [table.epochs for table in tables]
        examples = [own * int(size) for own, size in zip(epochs, sizes, strict=True)]
        deadline, waits = train.deadline or math.inf, train.selection == "available"
        made = cls(config.seed, devices, examples, deadline, waits, excluded=excluded)
        if train.late == "drop":
            return made
        return replace(made, epochs=epochs, per_step=[table.batch_size * table.accumulate for table in tables])

    @cached_property
    def _mornings(self) -> np.ndarray:
        """The time of the day, from 0 to 1, from which each client can be reached: (clients,)."""
        return stream(self.seed, "mornings").random(len(self.devices))

    @cached_property
    def _shares(self) -> np.ndarray:
        """The share of the day in which each client can be reached: (clients,); 0 if it is excluded."""
        shares = np.array([device.availability for device in self.devices])
        shares[list(self.excluded)] = 0.0
        return shares

    def reachable(self, now: float) -> np.ndarray:
        """Whether each client can be reached: every day for a share of it, from a time of its own on."""
        return (now / DAY - self._mornings) % 1.0 < self._shares

    def begins(self, state: State) -> float:
        """When the next round begins, in simulated seconds."""
        now = float(state[GROUP]["seconds"]) if GROUP in state else 0.0
        if not self.waits or self.reachable(now).any():
            return now
        mornings = (np.floor(now / DAY) + np.array([[0.0], [1.0]]) + self._mornings[self._shares > 0]) * DAY
        return float(mornings[mornings > now].min()) + 1e-3  # because rounding may place a morning just before itself

    def time(self, algorithm: Algorithm, state: State, messages: Mapping[int, State], info: RoundInfo, needed: int) -> Timed:
        """A round in which these messages are sent, and which ends as soon as `needed` clients have answered."""
        began = self.begins(state)
        costs = {client: self.costs(client, algorithm, state, message, info) for client, message in messages.items()}
        steps: dict[int, int] = {}
        for client, (compute, transfer) in costs.items():
            if self.per_step and compute + transfer > self.deadline:
                steps[client] = self.steps_in_time(client, transfer)
                # Who cannot make one step is too late with it as well.
                costs[client] = self.seconds(client, max(steps[client], 1)), transfer
        clients = {client: {"compute": compute, "transfer": transfer} for client, (compute, transfer) in costs.items()}
        times = {client: compute + transfer for client, (compute, transfer) in costs.items()}
        lost = {client: "dropped out" for client in times if self.drops_out(client, info.round)}
        what = "a step in time" if self.per_step else "in time"
        lost |= {
            client: f"did not finish {what}: it takes {seconds:.4g} s, and train.deadline = {self.deadline:g}"
            for client, seconds in times.items()
            if seconds > self.deadline and client not in lost
        }
        answers = sorted((client for client in times if client not in lost), key=lambda client: (times[client], client))
        used = answers[:needed]
        lost |= dict.fromkeys(answers[needed:], f"answered after {needed} others had")
        waited = used if len(used) == needed else times
        seconds = min(max((times[client] for client in waited), default=0.0), self.deadline)
        steps = {client: steps[client] for client in sorted(used) if client in steps}
        shares = {client: count / self.all_steps(client) for client, count in steps.items()}
        return Timed(tuple(sorted(used)), lost, began, seconds, clients, steps, shares)

    def costs(self, client: int, algorithm: Algorithm, state: State, message: State, info: RoundInfo) -> tuple[float, float]:
        """(compute, transfer) in seconds of a client that is sent this message."""
        down, up = (sum(map(nbytes, groups.values())) for groups in (message, algorithm.uploads(state, client, info)))
        return self.devices[client].seconds(self.examples[client], down, up)

    def all_steps(self, client: int) -> int:
        """The optimizer steps that a client makes if it has the time."""
        epochs = self.epochs[client]
        return epochs * math.ceil(self.examples[client] / epochs / self.per_step[client])

    def seconds(self, client: int, steps: int) -> float:
        """The time to compute this many steps. As if the last step of every epoch were the one that may be smaller."""
        size, per_step = self.examples[client] // self.epochs[client], self.per_step[client]
        whole, rest = divmod(steps, max(math.ceil(size / per_step), 1))
        return self.devices[client].seconds(whole * size + min(rest * per_step, size), 0, 0)[0]

    def steps_in_time(self, client: int, transfer: float) -> int:
        """How many steps fit before the deadline beside `transfer` seconds."""
        steps = range(1, self.all_steps(client) + 1)
        return bisect_right(steps, self.deadline, key=lambda count: self.seconds(client, count) + transfer)

    def drops_out(self, client: int, round: int) -> bool:
        """Whether the client never answers in this round."""
        return float(stream(self.seed, "drop-out", client, round).random()) < self.devices[client].dropout
