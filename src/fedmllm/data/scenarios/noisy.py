"""noisy: a modality is there but bad, such as a blurred picture or a text with typing errors."""

from __future__ import annotations

import numpy as np

from fedmllm.data.corruptions import KINDS
from fedmllm.data.samples import MODALITIES, Modality, Sample
from fedmllm.data.scenarios import BOTH, Modalities, Noise, Scenario, scenarios


@scenarios.register("noisy")
def noisy(*, share: float = 0.5, severity: int = 3, image: list[str] | None = None, text: list[str] | None = None) -> Scenario:
    """Nothing is missing, but a `share` of the pictures and of the texts are corrupted, at a severity from 0 to 5.

    `image` and `text` name the kinds of corruption, of which each affected picture or text gets one at random; by default all.
    An empty list leaves the modality as it is. At severity 0 nothing is corrupted.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share = {share} must be between 0 and 1")
    if not 0 <= severity <= 5:
        raise ValueError(f"severity = {severity} must be from 0, which corrupts nothing, to 5")
    kinds: dict[Modality, tuple[str, ...]] = {}
    for modality, chosen in zip(MODALITIES, (image, text), strict=True):
        kinds[modality] = KINDS[modality] if chosen is None else tuple(chosen)
        if unknown := set(kinds[modality]) - set(KINDS[modality]):
            raise ValueError(f"{modality}: there is no corruption {min(unknown)!r}; choose among {', '.join(KINDS[modality])}")

    def noise(sample: Sample, visible: Modalities, rng: np.random.Generator) -> Noise:
        affected, choices = rng.random(2) < share, rng.random(2)  # drawn for both, whatever is visible
        return tuple(
            (modality, kinds[modality][int(choice * len(kinds[modality]))], severity)
            for modality, is_affected, choice in zip(MODALITIES, affected, choices, strict=True)
            if is_affected and severity and kinds[modality] and modality in visible
        )

    return Scenario(clients=lambda number, rng: [BOTH] * number, noise=noise, expected=lambda kind, number: {kind: 1.0})
