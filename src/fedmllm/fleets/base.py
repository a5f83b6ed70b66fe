"""What every fleet is given: the algorithm, the data of each client, and the model to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmllm.algorithms import Algorithm
from fedmllm.config import TrainTable
from fedmllm.models.mllm import MLLM, Encoded
from fedmllm.tensors import Tensors


@dataclass(frozen=True)
class Site:
    """`data[client]` are a client's encoded samples, `gaps[client]` the share of its (sample, modality) slots that are empty;
    `initial` is the adapter that all start from, `memory` the folder for what clients remember between rounds, `cohort` how
    many clients train in one pass."""

    model: MLLM
    algorithm: Algorithm
    data: Mapping[int, Sequence[Encoded]]
    train: TrainTable
    initial: Tensors
    gaps: Mapping[int, float]
    memory: Path
    cohort: int = 1
