"""The interface between a run and its fleets: what a fleet receives, and what opens one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmllm.algorithms import Algorithm, RoundInfo
from fedmllm.config import TrainTable
from fedmllm.federation import Fleet
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.tensors import State, Tensors

InRound = Callable[[int, RoundInfo], tuple[Sequence[Encoded], float]]
"""(client, round) -> the client's encoded samples and its gap in that round."""


@dataclass(frozen=True)
class FleetContext:
    """What a fleet needs to train the clients of one run.

    `data[client]` holds a client's encoded samples, `gaps[client]` the share of its (sample, modality) slots that are empty.
    If what clients see changes over the rounds, `in_round(client, info)` has both as they are in a round. `train_of(client)` is
    [train] as it is for a client, if clients differ in it. `initial` is the adapter from which all clients start, `memory` the
    folder for the clients' state between rounds, `cohort` the number of clients that train in one pass. The other fields are
    for clients in other processes: `run` is the permanent name of the run, `config` its experiment as TOML, and `last` maps
    each client to the last round that used its update.
    """

    model: MLLM
    algorithm: Algorithm
    data: Mapping[int, Sequence[Encoded]]
    train: TrainTable
    initial: Tensors
    gaps: Mapping[int, float]
    memory: Path
    cohort: int = 1
    run: str = ""
    config: str = ""
    last: Mapping[int, int] = field(default_factory=dict)
    in_round: InRound | None = None
    train_of: Callable[[int], TrainTable] | None = None

    def table(self, client: int) -> TrainTable:
        """The client's own [train]."""
        return self.train_of(client) if self.train_of else self.train


@dataclass(frozen=True)
class FleetBackend:
    """Opens the fleets of a run.

    `local` means that clients train in this process, which encodes their data. `secure` means that the fleet is also a
    `SecureTransport`; a backend that is neither cannot run experiments with secure aggregation. `evaluate(messages, done)` is
    set if clients test on data of their own: it returns one row of metrics per client for its message after `done` rounds.
    """

    open: Callable[[FleetContext], Fleet]
    local: bool = True
    secure: bool = False
    evaluate: Callable[[Mapping[int, State], int], Mapping[int, Mapping[str, Any]]] | None = None
