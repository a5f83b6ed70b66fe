"""What a fleet is given, and what opens one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmllm.algorithms import Algorithm
from fedmllm.config import TrainTable
from fedmllm.federation import Fleet
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.tensors import State, Tensors


@dataclass(frozen=True)
class FleetContext:
    """What a fleet needs to train the clients of one run.

    `data[client]` holds a client's encoded samples, `gaps[client]` the share of its (sample, modality) slots that are empty.
    `initial` is the adapter that all clients start from, `memory` the folder for the clients' state between rounds, `cohort`
    the number of clients that train in one pass. For clients in other processes: `run` names the run, `config` is its
    experiment as TOML, and `last` has the last round in which each client's update was used.
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


@dataclass(frozen=True)
class FleetBackend:
    """Opens the fleets of a run.

    `local`: clients train in this process, which encodes their data. `secure`: a fleet for clients in other processes is a
    `SecureTransport` as well; without it, experiments with secure aggregation are refused. `evaluate(messages, done)`, if
    clients test on data of their own, returns one row of figures per client for its message after `done` rounds.
    """

    open: Callable[[FleetContext], Fleet]
    local: bool = True
    secure: bool = False
    evaluate: Callable[[Mapping[int, State], int], Mapping[int, Mapping[str, Any]]] | None = None
