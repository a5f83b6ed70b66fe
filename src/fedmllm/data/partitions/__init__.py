"""Partitions: how the samples are distributed over the clients. One file per partition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.samples import Sample
from fedmllm.registry import Registry

Deal = Callable[[Sequence[Sample], Sequence[int], np.random.Generator], NDArray[np.int64]]
"""(samples ordered by id, clients that may hold them, generator) -> the client of each sample."""


@dataclass(frozen=True)
class GroupedDeal:
    """A deal that keeps samples with the same `key` together, whatever modalities they have."""

    deal: Deal
    key: Callable[[Sample], str]

    def __call__(self, samples: Sequence[Sample], clients: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
        return self.deal(samples, clients, rng)


partitions: Registry[Deal] = Registry("partition", __name__)


def indices_by_value(values: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """value -> the indices at which it occurs; values are sorted."""
    indices: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        indices.setdefault(value, []).append(index)
    return {value: np.array(indices[value], dtype=np.int64) for value in sorted(indices)}
