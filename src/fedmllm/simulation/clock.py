"""The virtual clock of synchronous rounds: how long each client takes, which ones answer in time, and when the round ends.

A client takes (bytes down / downlink) + (samples / speed) + (bytes up / uplink); the server's own work takes no time. A round
lasts until the last client has answered, or as many as it needs, or until the deadline. A client that drops out is waited for
until the deadline, or if there is none for as long as it would have taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    the length of the round, `clients` the time that each takes to "compute" and for "transfer"."""

    used: tuple[int, ...]
    lost: Mapping[int, str]
    began: float
    seconds: float
    clients: Mapping[int, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        return {"began": self.began, "seconds": self.seconds, "clients": dict(self.clients), "lost": sorted(self.lost)}

    @property
    def state(self) -> State:
        """What the server remembers."""
        return {GROUP: {"seconds": torch.tensor([self.began + self.seconds], dtype=torch.float64)}}


@dataclass(frozen=True)
class Simulation:
    """`devices` and `examples` have, by client, its device and the samples that it trains on in a round. A client that needs
    more than `deadline` seconds is not waited for. If the server `waits`, a round begins when a client can be reached."""

    seed: int
    devices: Sequence[Device]
    examples: Sequence[int]
    deadline: float = math.inf
    waits: bool = False

    @classmethod
    def of(cls, config: Experiment, sizes: Sequence[int]) -> Simulation | None:
        """The simulation that the experiment describes, with `sizes` samples by client; None if it describes no devices."""
        devices = devices_of(config.clients, len(sizes), config.seed)
        if not devices:
            return None
        examples, train = [config.train.epochs * int(size) for size in sizes], config.train
        return cls(config.seed, devices, examples, train.deadline or math.inf, train.selection == "available")

    @cached_property
    def _mornings(self) -> np.ndarray:
        """The time of the day, from 0 to 1, from which each client can be reached: (clients,)."""
        return stream(self.seed, "mornings").random(len(self.devices))

    def reachable(self, now: float) -> np.ndarray:
        """Whether each client can be reached: every day for a share of it, from a time of its own on."""
        return (now / DAY - self._mornings) % 1.0 < np.array([device.availability for device in self.devices])

    def begins(self, state: State) -> float:
        """When the next round begins, in simulated seconds."""
        now = float(state[GROUP]["seconds"]) if GROUP in state else 0.0
        if not self.waits or self.reachable(now).any():
            return now
        mornings = (np.floor(now / DAY) + np.array([[0.0], [1.0]]) + self._mornings) * DAY
        return float(mornings[mornings > now].min()) + 1e-3  # because rounding may place a morning just before itself

    def time(self, algorithm: Algorithm, state: State, messages: Mapping[int, State], info: RoundInfo, needed: int) -> Timed:
        """A round in which these messages are sent, and which ends as soon as `needed` clients have answered."""
        began = self.begins(state)
        costs = {client: self.costs(client, algorithm, state, message, info) for client, message in messages.items()}
        clients = {client: {"compute": compute, "transfer": transfer} for client, (compute, transfer) in costs.items()}
        times = {client: compute + transfer for client, (compute, transfer) in costs.items()}
        lost = {client: "dropped out" for client in times if self.drops_out(client, info.round)}
        lost |= {
            client: f"did not finish in time: it takes {seconds:.4g} s, and train.deadline = {self.deadline:g}"
            for client, seconds in times.items()
            if seconds > self.deadline and client not in lost
        }
        answers = sorted((client for client in times if client not in lost), key=lambda client: (times[client], client))
        used = answers[:needed]
        lost |= dict.fromkeys(answers[needed:], f"answered after {needed} others had")
        waited = used if len(used) == needed else times
        seconds = min(max((times[client] for client in waited), default=0.0), self.deadline)
        return Timed(tuple(sorted(used)), lost, began, seconds, clients)

    def costs(self, client: int, algorithm: Algorithm, state: State, message: State, info: RoundInfo) -> tuple[float, float]:
        """(compute, transfer) in seconds of a client that is sent this message."""
        down, up = (sum(map(nbytes, groups.values())) for groups in (message, algorithm.uploads(state, client, info)))
        return self.devices[client].seconds(self.examples[client], down, up)

    def drops_out(self, client: int, round: int) -> bool:
        """Whether the client never answers in this round."""
        return float(stream(self.seed, "drop-out", client, round).random()) < self.devices[client].dropout
