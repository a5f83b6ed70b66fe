"""missing: samples lose modalities independently (FedMLLM, arXiv 2411.14717, section 3)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fedmllm.data.samples import MODALITIES, Sample
from fedmllm.data.scenarios import BOTH, NONE, Modalities, Scenario, Shares, scenarios, subsets


@scenarios.register("missing", former={"never_empty": ("empty", {True: "redraw", False: "keep"})})
def missing(*, rate: float = 0.3, empty: Literal["keep", "redraw", "drop"] = "keep") -> Scenario:
    """Each sample loses its image and its text independently, each with probability `rate`; it may lose all it has.

    Such a sample stays with its question alone if `empty` is "keep", the rule of the published code. "drop" leaves it out of
    the manifest. "redraw" repeats the draw, so a sample with both modalities loses each in rate / (1 + rate) of all draws,
    never in more than half, and a sample with one modality keeps it.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate = {rate} must be at least 0 and below 1")

    def present(sample: Sample, rng: np.random.Generator) -> Modalities:
        if empty == "redraw" and len(sample.modalities) < 2:
            return sample.modalities
        while True:
            # Drawn for both modalities whatever the sample has, so that the draw for the image does not depend on the text.
            kept = frozenset(m for m, lost in zip(MODALITIES, rng.random(2) < rate, strict=True) if not lost)
            if kept or empty != "redraw":
                return kept & sample.modalities

    def expected(kind: Modalities, number: int) -> Shares:
        shares = {shown: (1 - rate) ** len(shown) * rate ** len(kind - shown) for shown in subsets(kind)}
        if empty == "keep" or not kind:
            return shares
        lost = shares.pop(NONE)
        if empty == "drop":
            return shares
        return {kind: 1.0} if len(kind) == 1 else {shown: share / (1 - lost) for shown, share in shares.items()}

    return Scenario(
        clients=lambda number, rng: [BOTH] * number,
        visible=lambda sample, client, rng: present(sample, rng),
        keeps=(lambda sample, rng: bool(present(sample, rng)) or not sample.modalities) if empty == "drop" else None,
        expected=expected,
    )
