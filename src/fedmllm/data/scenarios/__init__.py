"""Scenarios: which modalities each client has, and which modalities of each sample are visible. One file per scenario."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedmllm.data.samples import MODALITIES, Modality, Sample
from fedmllm.registry import Registry

Modalities = frozenset[Modality]
BOTH: Modalities = frozenset(MODALITIES)


def see_all(sample: Sample, client: int, rng: np.random.Generator) -> Modalities:
    """All modalities of the sample."""
    return sample.modalities


@dataclass(frozen=True)
class Scenario:
    """How modalities are missing, on clients and in samples."""

    clients: Callable[[int, np.random.Generator], Sequence[Modalities]]
    """(number of clients, generator) -> the modalities that each client has, which decide which samples it may hold."""
    visible: Callable[[Sample, int, np.random.Generator], Modalities] = see_all
    """(sample, client that holds it, generator) -> the sample's modalities that are present there, before those that the client
    lacks are removed. The generator belongs to the sample: its numbers depend neither on the client nor on other samples."""


scenarios: Registry[Scenario] = Registry("scenario", __name__)
