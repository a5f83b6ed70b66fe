"""Which clients the server asks in a round, if not all are alike to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fedmllm.algorithms import Update
from fedmllm.config import TrainTable
from fedmllm.simulation.clock import Simulation
from fedmllm.tensors import State

GROUP = "selection"
"""The group of the server's state that holds what it knows of the clients."""


class Policy(Protocol):
    """Chooses clients by what the server's state says."""

    def choose(self, rng: np.random.Generator, count: int, state: State) -> Sequence[int]:
        """The ids of up to `count` different clients."""

    def learned(self, state: State, updates: Sequence[Update]) -> State:
        """The groups of the state that these valid updates change."""


@dataclass(frozen=True)
class Available:
    """Any of the clients that can be reached when the round begins, each as likely as the others. If nobody can, it begins as
    soon as somebody can."""

    simulation: Simulation

    def choose(self, rng: np.random.Generator, count: int, state: State) -> Sequence[int]:
        indices = np.flatnonzero(self.simulation.reachable(self.simulation.begins(state)))
        chosen: list[int] = rng.choice(indices, size=min(count, len(indices)), replace=False).tolist()
        return chosen

    def learned(self, state: State, updates: Sequence[Update]) -> State:
        return {}


@dataclass(frozen=True)
class PowerOfChoice:
    """Of some clients that are drawn in proportion to their samples, those with the largest loss: Cho et al. 2020, "Client
    Selection in Federated Learning" (2010.01243), in the variant rpow-d that costs no further messages.

    The loss is the client's mean training loss in the last round that used it; a client that no round has used comes first.
    Equal losses are ordered by the draw. `excluded` clients are never drawn.
    """

    sizes: Sequence[int]
    candidates: int
    excluded: Sequence[int] = ()

    def choose(self, rng: np.random.Generator, count: int, state: State) -> Sequence[int]:
        weights = np.maximum(np.asarray(self.sizes, dtype=float), 1.0)
        weights[list(self.excluded)] = 0.0
        candidates = min(max(self.candidates, count), len(weights) - len(self.excluded))
        drawn: list[int] = rng.choice(len(weights), size=candidates, replace=False, p=weights / weights.sum()).tolist()
        losses = self._losses(state).tolist()
        return sorted(drawn, key=lambda client: -losses[client] if losses[client] >= 0 else -np.inf)[:count]

    def learned(self, state: State, updates: Sequence[Update]) -> State:
        losses = self._losses(state).clone()
        for update in updates:
            losses[update.client] = max(update.metrics.get("loss", 0.0), 0.0)
        return {GROUP: {"losses": losses}}

    def _losses(self, state: State) -> torch.Tensor:
        """The last loss of each client: (clients,), −1 if it is not known."""
        return state[GROUP]["losses"] if GROUP in state else torch.full((len(self.sizes),), -1.0, dtype=torch.float64)


def policy_of(
    train: TrainTable, simulation: Simulation | None, sizes: Sequence[int], excluded: Sequence[int] = ()
) -> Policy | None:
    """The policy that [train] names, with `sizes` samples by client; None for the uniform draw."""
    if train.selection == "power-of-choice":
        return PowerOfChoice(sizes, train.candidates or 2 * train.clients_per_round, excluded)
    return Available(simulation) if train.selection == "available" and simulation else None
