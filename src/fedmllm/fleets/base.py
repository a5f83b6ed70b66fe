"""What every fleet is given: the algorithm, the data of each client, and the model to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmllm.algorithms import Algorithm
from fedmllm.config import TrainTable
from fedmllm.models.mllm import MLLM, Encoded


@dataclass(frozen=True)
class Site:
    """`data[client]` are a client's encoded samples; `memory` is the folder for what clients remember between rounds."""

    model: MLLM
    algorithm: Algorithm
    data: Mapping[int, Sequence[Encoded]]
    train: TrainTable
    memory: Path
