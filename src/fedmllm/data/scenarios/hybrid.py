"""hybrid: image-only, text-only and paired clients together (FedMLLM, arXiv 2411.14717, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmllm.data.samples import MODALITIES
from fedmllm.data.scenarios import Modalities, Scenario, scenarios


@scenarios.register("hybrid")
def hybrid(*, presence: float = 0.7) -> Scenario:
    """Each client has each modality with probability `presence`; one that would have none gets one by a coin."""
    if not 0 <= presence <= 1:
        raise ValueError(f"presence = {presence} must be between 0 and 1")

    def clients(number: int, rng: np.random.Generator) -> Sequence[Modalities]:
        found = []
        for _ in range(number):
            has = rng.random(2) < presence
            coin = MODALITIES[int(rng.integers(2))]  # drawn whether needed or not: later clients do not shift
            found.append(frozenset(m for m, there in zip(MODALITIES, has, strict=True) if there) or frozenset((coin,)))
        return found

    return Scenario(clients=clients)
