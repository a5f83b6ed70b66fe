"""hybrid: image-only, text-only and paired clients together (FedMLLM, arXiv 2411.14717, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmllm.data.samples import MODALITIES
from fedmllm.data.scenarios import Modalities, Scenario, scenarios


@scenarios.register("hybrid")
def hybrid(*, presence: float = 0.7) -> Scenario:
    """Each client has each modality with probability `presence`; a client without any gets one of them at random."""
    if not 0 <= presence <= 1:
        raise ValueError(f"presence = {presence} must be between 0 and 1")

    def clients(number: int, rng: np.random.Generator) -> Sequence[Modalities]:
        modalities: list[Modalities] = []
        for _ in range(number):
            present = rng.random(2) < presence
            fallback = MODALITIES[int(rng.integers(2))]  # always drawn, so that the draws of later clients do not shift
            drawn = frozenset(m for m, is_present in zip(MODALITIES, present, strict=True) if is_present)
            modalities.append(drawn or frozenset((fallback,)))
        return modalities

    return Scenario(clients=clients)
