"""What every fleet is given: the algorithm, the data of each client, and the model to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedmllm.algorithms import Algorithm, RoundInfo, Update
from fedmllm.config import TrainTable
from fedmllm.federation import Fleet
from fedmllm.models.mllm import MLLM, Encoded
from fedmllm.secure.settings import Phase
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


@runtime_checkable
class Carrier(Protocol):
    """Puts one of the four questions of a secure round to clients, and brings back what they say; `secure.site` answers there.

    `messages` has the groups of tensors that each client is sent. An answer is an Update of groups alone, or with a `problem`;
    who does not answer in time may be left out. In the phase "masked" clients train, with learning rate `lr`.
    """

    def ask(self, phase: Phase, info: RoundInfo, messages: Mapping[int, State], lr: float) -> Sequence[Update]: ...


@dataclass(frozen=True)
class FleetKind:
    """`make` a fleet for a site. `here`: clients train in this process, which encodes their data. `refuse` says why a run
    cannot be started from here, and what to do instead; empty where it can. `evaluate(messages, done)`, where clients have test
    data of their own and are asked for it: what each makes of its message after `done` rounds, a row for its figures. `secure`:
    a fleet of this kind for clients elsewhere is a `Carrier` too; without it, experiments that hide updates are refused."""

    make: Callable[[Site], Fleet]
    here: bool = True
    refuse: str = ""
    evaluate: Callable[[Mapping[int, State], int], Mapping[int, Mapping[str, Any]]] | None = None
    secure: bool = False
