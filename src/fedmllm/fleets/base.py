"""What every fleet is given: the algorithm, the data of each client, and the model to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmllm.algorithms import Algorithm
from fedmllm.config import TrainTable
from fedmllm.federation import Fleet
from fedmllm.models.mllm import MLLM, Encoded
from fedmllm.tensors import State, Tensors


@dataclass(frozen=True)
class Site:
    """`data[client]` are a client's encoded samples, `gaps[client]` the share of its (sample, modality) slots that are empty;
    `initial` is the adapter that all start from, `memory` the folder for what clients remember between rounds, `cohort` how
    many clients train in one pass. For clients elsewhere: `run` is the run's name, `config` its experiment as TOML, `last` the
    last round in which each client's update was used."""

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
class FleetKind:
    """`make` a fleet for a site. `here`: clients train in this process, which encodes their data. `refuse` says why a run
    cannot be started from here, and what to do instead; empty where it can. `evaluate(messages, done)`, where clients have test
    data of their own and are asked for it: what each makes of its message after `done` rounds, a row for its figures."""

    make: Callable[[Site], Fleet]
    here: bool = True
    refuse: str = ""
    evaluate: Callable[[Mapping[int, State], int], Mapping[int, Mapping[str, Any]]] | None = None
