"""One file a scenario: which modalities a client has at all, and which of a sample's it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedmllm.data.samples import MODALITIES, Modality, Sample
from fedmllm.registry import Registry

Modalities = frozenset[Modality]
BOTH: Modalities = frozenset(MODALITIES)


def see_all(sample: Sample, rng: np.random.Generator) -> Modalities:
    return sample.modalities


@dataclass(frozen=True)
class Scenario:
    """`clients(number, generator)`: the modalities that each client has, which decides who may hold a sample.
    `visible(sample, generator)`: what of the sample is there, before the client's own limits; the generator is the
    sample's own, so the draw does not depend on the order of the samples.
    """

    clients: Callable[[int, np.random.Generator], Sequence[Modalities]]
    visible: Callable[[Sample, np.random.Generator], Modalities] = see_all


scenarios: Registry[Scenario] = Registry("scenario", __name__)
