"""hybrid: image-only, text-only and paired clients together (FedMLLM, arXiv 2411.14717, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedmllm.data.samples import MODALITIES
from fedmllm.data.scenarios import BOTH, IMAGE, TEXT, Modalities, Scenario, Shares, scenarios


@scenarios.register("hybrid")
def hybrid(*, presence: float = 0.7, coin: Literal["sample", "client"] = "sample") -> Scenario:
    """Each client has each modality with probability `presence`; one without any tosses a coin, per sample or per client.

    The published code tosses the coin for each sample in its data of memes and of disasters, and for each client in its medical
    data. With a coin per sample, a sample that has one modality itself shows it.
    """
    if not 0 <= presence <= 1:
        raise ValueError(f"presence = {presence} must be between 0 and 1")

    def clients(number: int, rng: np.random.Generator) -> Sequence[Modalities]:
        modalities: list[Modalities] = []
        for _ in range(number):
            present = rng.random(2) < presence
            fallback = MODALITIES[int(rng.integers(2))]  # always drawn, so that the draws of later clients do not shift
            drawn = frozenset(m for m, is_present in zip(MODALITIES, present, strict=True) if is_present)
            modalities.append(drawn or frozenset((fallback,) if coin == "client" else ()))
        return modalities

    def expected(kind: Modalities, number: int) -> Shares:
        one = presence * (1 - presence) + (1 - presence) ** 2 / 2
        return {BOTH: presence**2, IMAGE: one, TEXT: one} if kind == BOTH else {kind: 1.0}

    return Scenario(clients, coin_per_sample=coin == "sample", expected=expected)
