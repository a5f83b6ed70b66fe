"""graded: every client loses each modality at a rate of its own, so that no two clients are alike."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from fedmllm.data.samples import MODALITIES, Sample
from fedmllm.data.scenarios import BOTH, Modalities, Scenario, Shares, Visible, scenarios, subsets


@scenarios.register("graded")
def graded(*, image: float = 0.3, text: float = 0.3, concentration: float = 2.0) -> Scenario:
    """Each client has its own rates at which samples lose image and text, drawn from Beta distributions with these means.

    The rate of a modality with mean m is drawn from Beta(m·κ, (1 − m)·κ), whose variance is m (1 − m) / (κ + 1): with a small
    `concentration` κ most clients lose nearly all or nearly nothing, with a large one all lose the share m, as in `missing`. A
    sample that loses all it has stays with its question alone.
    """
    means = {"image": image, "text": text}
    for name, mean in means.items():
        if not 0 <= mean < 1:
            raise ValueError(f"{name} = {mean} must be at least 0 and below 1")
    if concentration <= 0:
        raise ValueError(f"concentration = {concentration} must be above 0")

    def prepared(samples: Sequence[Sample], number: int, rng: np.random.Generator) -> Visible:
        # A Beta distribution with mean 0 is a point, which `rng.beta` refuses to draw from.
        a = np.array([max(means[m] * concentration, 1e-300) for m in MODALITIES])
        b = np.array([(1 - means[m]) * concentration for m in MODALITIES])
        rates = rng.beta(a, b, size=(number, 2)) * [means[m] > 0 for m in MODALITIES]

        def visible(sample: Sample, client: int, own: np.random.Generator) -> Modalities:
            lost = own.random(2) < rates[client]
            return sample.modalities & frozenset(m for m, is_lost in zip(MODALITIES, lost, strict=True) if not is_lost)

        return visible

    def expected(kind: Modalities, number: int) -> Shares:
        return {shown: prod(1 - means[m] if m in shown else means[m] for m in kind) for shown in subsets(kind)}

    return Scenario(clients=lambda number, rng: [BOTH] * number, prepared=prepared, expected=expected)
