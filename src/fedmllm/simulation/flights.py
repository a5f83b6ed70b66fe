"""What is on its way in an asynchronous federation, and how the server's state keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fedmllm.algorithms import Update, failed
from fedmllm.simulation.clock import GROUP
from fedmllm.tensors import State, Tensors

_FLIGHTS, _PROBLEM, _UPDATE, _SENT = "flights", "problem-", "flight-", "sent-"
_COUNTS = ("client", "version", "examples", "steps")
_FIGURES = ("arrives", "compute", "transfer", "loss", "padding")


@dataclass(frozen=True)
class Flight:
    """A client that was sent the model after `version` steps and answers when the clock shows `arrives` seconds; `update` is
    None if it drops out, and has a `problem` if it could not be trained."""

    client: int
    version: int
    arrives: float
    compute: float
    transfer: float
    update: Update | None

    @property
    def trained(self) -> bool:
        return self.update is not None and not self.update.problem

    def row(self) -> dict[str, float]:
        update = self.update or Update(self.client, {}, 0, 0)
        metrics = {key: update.metrics.get(key, 0.0) for key in ("loss", "padding")}
        counts = {"client": self.client, "version": self.version, "examples": update.examples, "steps": update.steps}
        return {**counts, "arrives": self.arrives, "compute": self.compute, "transfer": self.transfer, **metrics}


@dataclass
class Traffic:
    """The clock, the clients on their way, and the adapters that they were sent, by version."""

    now: float = 0.0
    flights: list[Flight] = field(default_factory=list)
    sent: dict[int, Tensors] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop the adapters that nobody has any more."""
        used = {flight.version for flight in self.flights}
        self.sent = {version: tensors for version, tensors in self.sent.items() if version in used}

    def to_state(self) -> State:
        """The groups of the server's state that hold it, exactly."""
        rows = [flight.row() for flight in self.flights]
        numbers = {key: torch.tensor([row[key] for row in rows], dtype=torch.int64) for key in _COUNTS}
        numbers |= {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in _FIGURES}
        state: State = {GROUP: {"seconds": torch.tensor([self.now], dtype=torch.float64)}, _FLIGHTS: numbers}
        state |= {f"{_SENT}{version}": tensors for version, tensors in self.sent.items()}
        for flight in self.flights:
            if flight.update is None:
                continue
            if flight.update.problem:
                text = torch.tensor(list(flight.update.problem.encode()), dtype=torch.uint8)
                numbers[f"{_PROBLEM}{flight.client}"] = text
            else:
                state[f"{_UPDATE}{flight.client}"] = flight.update.groups["adapter"]
        return state

    @classmethod
    def of(cls, state: State) -> Traffic:
        """The inverse of `to_state`; nothing is on its way in a state without its groups."""
        if _FLIGHTS not in state:
            return cls()
        columns = {key: state[_FLIGHTS][key].tolist() for key in (*_COUNTS, *_FIGURES)}
        flights = [_flight(dict(zip(columns, row, strict=True)), state) for row in zip(*columns.values(), strict=True)]
        sent = {int(group.removeprefix(_SENT)): state[group] for group in state if group.startswith(_SENT)}
        return cls(float(state[GROUP]["seconds"]), flights, sent)


def _flight(row: dict[str, float], state: State) -> Flight:
    client, update = int(row["client"]), None
    if (text := state[_FLIGHTS].get(f"{_PROBLEM}{client}")) is not None:
        update = failed(client, bytes(text.tolist()).decode())
    if f"{_UPDATE}{client}" in state:
        metrics = {"loss": row["loss"], "padding": row["padding"]}
        groups = {"adapter": state[f"{_UPDATE}{client}"]}
        update = Update(client, groups, int(row["examples"]), int(row["steps"]), metrics)
    return Flight(client, int(row["version"]), row["arrives"], row["compute"], row["transfer"], update)


def without_traffic(state: State) -> State:
    """What the algorithm knows of the server's state."""
    ours = (_UPDATE, _SENT)
    return {group: t for group, t in state.items() if group not in (GROUP, _FLIGHTS) and not group.startswith(ours)}


def first_to_arrive(flights: Sequence[Flight]) -> Flight:
    return min(flights, key=lambda flight: (flight.arrives, flight.client))
