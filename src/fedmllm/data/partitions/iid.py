"""iid: no label skew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.partitions import Deal, partitions
from fedmllm.data.samples import Sample


@partitions.register("iid")
def iid() -> Deal:
    """Samples are shuffled and distributed evenly: of 10 samples, 3 clients get 4, 3 and 3."""

    def deal(samples: Sequence[Sample], clients: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
        owner = np.resize(np.array(clients, dtype=np.int64), len(samples))
        return rng.permutation(owner)

    return deal
