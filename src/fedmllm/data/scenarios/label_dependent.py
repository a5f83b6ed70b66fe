"""label-dependent: what is missing depends on the class, so that the absence of a modality says something about the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedmllm.data.samples import MODALITIES, Sample
from fedmllm.data.scenarios import BOTH, Modalities, Scenario, Visible, scenarios


@scenarios.register("label-dependent")
def label_dependent(
    *,
    rate: float = 0.3,
    slope: float = 0.4,
    rates: dict[str, float] | None = None,
    modality: Literal["image", "text", "both"] = "both",
) -> Scenario:
    """Samples lose `modality` at a rate that depends on their class, so absence says something about the class.

    `rates` gives the rate of every class. Without it, the classes in alphabetical order get evenly spaced rates from `rate` −
    `slope` / 2 to `rate` + `slope` / 2. With "both", a sample loses image and text independently, each at this rate; one that
    loses all it has stays with its question alone.
    """
    lowest, highest = rate - abs(slope) / 2, rate + abs(slope) / 2
    if rates is None and not 0 <= lowest <= highest < 1:
        raise ValueError(f"rate = {rate}, slope = {slope}: rates from {lowest:g} to {highest:g} must be at least 0 and below 1")
    for label, value in (rates or {}).items():
        if not 0 <= value < 1:
            raise ValueError(f"rates: {value} for the class {label!r} must be at least 0 and below 1")
    affected = [modality in ("both", m) for m in MODALITIES]

    def prepared(samples: Sequence[Sample], number: int, rng: np.random.Generator) -> Visible:
        classes = sorted({sample.label for sample in samples})
        if len(classes) < 2:
            raise ValueError("the scenario needs samples of at least two classes, and these have no or one class")
        if rates is None:
            by_class = dict(zip(classes, (rate + slope * np.linspace(-0.5, 0.5, len(classes))).tolist(), strict=True))
        elif rates.keys() != set(classes):
            raise ValueError(f"rates names the classes {sorted(rates)}, and those of the training samples are {classes}")
        else:
            by_class = rates

        def visible(sample: Sample, client: int, own: np.random.Generator) -> Modalities:
            lost = (own.random(2) < by_class[sample.label]) & affected
            return sample.modalities & frozenset(m for m, is_lost in zip(MODALITIES, lost, strict=True) if not is_lost)

        return visible

    return Scenario(clients=lambda number, rng: [BOTH] * number, prepared=prepared)
