"""uneven-rates: every client loses modalities at its own rate."""

from collections.abc import Sequence

import numpy as np

from fedmllm.data.samples import MODALITIES, Sample
from fedmllm.data.scenarios import BOTH, Modalities, Scenario, scenarios


@scenarios.register("uneven-rates")
def uneven_rates(*, rates: list[float]) -> Scenario:
    """Client k's samples lose each modality with probability rates[k mod the number of rates]."""
    if not rates or not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"rates = {rates} must be numbers of at least 0 and below 1")

    def clients(number: int, rng: np.random.Generator) -> Sequence[Modalities]:
        return [BOTH] * number

    def visible(sample: Sample, client: int, rng: np.random.Generator) -> Modalities:
        while True:  # repeated for samples that would lose everything
            kept = frozenset(m for m in MODALITIES if rng.random() >= rates[client % len(rates)]) & sample.modalities
            if kept or not sample.modalities:
                return kept

    return Scenario(clients, visible)
