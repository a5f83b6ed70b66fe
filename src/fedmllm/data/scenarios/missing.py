"""missing: samples lose modalities independently (FedMLLM, arXiv 2411.14717, section 3)."""

from __future__ import annotations

import numpy as np

from fedmllm.data.samples import MODALITIES, Sample
from fedmllm.data.scenarios import BOTH, Modalities, Scenario, scenarios


@scenarios.register("missing")
def missing(*, rate: float = 0.3, never_empty: bool = True) -> Scenario:
    """Each sample loses its image and its text independently, each with probability `rate`.

    With `never_empty`, the draw is repeated for a sample that lost every modality, so a sample with one modality keeps it.
    `never_empty = false` matches the published code, where only the question of such a sample remains.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate = {rate} must be at least 0 and below 1")

    def visible(sample: Sample, client: int, rng: np.random.Generator) -> Modalities:
        if never_empty and len(sample.modalities) < 2:
            return sample.modalities
        while True:
            # Drawn for both modalities whatever the sample has, so that the draw for the image does not depend on the text.
            kept = frozenset(m for m, lost in zip(MODALITIES, rng.random(2) < rate, strict=True) if not lost)
            if kept & sample.modalities or not never_empty or not sample.modalities:
                return kept & sample.modalities

    return Scenario(clients=lambda number, rng: [BOTH] * number, visible=visible)
