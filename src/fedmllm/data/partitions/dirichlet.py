"""dirichlet: label skew (Yurochkin et al. 2019, 1905.12022)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.partitions import Deal, indices_by_value, partitions
from fedmllm.data.samples import Sample

_LARGEST_ALPHA = 1_000_000
"""At this alpha, the shares of ten clients differ by about 0.0001; with much larger ones, their sum overflows."""


@partitions.register("dirichlet")
def dirichlet(*, alpha: float = 0.5, min_per_label: int = 0) -> Deal:
    """Label skew: each label's samples are distributed in proportions drawn from Dirichlet(alpha) (1905.12022).

    Example with 3 clients: alpha = 100 gives each about a third of every label; alpha = 0.1 gives most of a label to one. If
    there are enough samples of a label, every client gets at least `min_per_label` of them, from the clients with the most.
    """
    if not 0 < alpha <= _LARGEST_ALPHA:
        raise ValueError(f'alpha = {alpha} must be above 0 and at most {_LARGEST_ALPHA}; for equal shares, set the name "iid"')
    if min_per_label < 0:
        raise ValueError(f"min_per_label = {min_per_label} must not be negative")

    def deal(samples: Sequence[Sample], clients: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
        owner, client_array = np.empty(len(samples), dtype=np.int64), np.array(clients, dtype=np.int64)
        for indices in indices_by_value([s.label for s in samples]).values():
            shuffled = rng.permutation(indices)
            shares = rng.dirichlet(np.full(len(client_array), alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(indices)).astype(np.int64)
            counts = np.diff(cuts, prepend=0, append=len(indices))
            least = min(min_per_label, len(indices) // len(client_array))
            while counts.min() < least:
                counts[counts.argmin()] += 1
                counts[counts.argmax()] -= 1
            owner[shuffled] = np.repeat(client_array, counts)
        return owner

    return deal
