"""Who holds which sample: each partition deals a pool of samples out to the clients that may hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.samples import Sample
from fedmllm.registry import Registry

Deal = Callable[[Sequence[Sample], Sequence[int], np.random.Generator], NDArray[np.int64]]
"""(samples in the order of their ids, the clients that may hold them, a generator) -> the client of each sample."""


@dataclass(frozen=True)
class Together:
    """A deal that keeps samples of equal `key` together, whatever modalities they have."""

    deal: Deal
    key: Callable[[Sample], str]

    def __call__(self, samples: Sequence[Sample], clients: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
        return self.deal(samples, clients, rng)


partitions: Registry[Deal] = Registry("partition", __name__)


def members_by_value(values: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    members: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        members.setdefault(value, []).append(index)
    return {value: np.array(members[value], dtype=np.int64) for value in sorted(members)}
