"""Scenarios: which modalities each client has, and which modalities of each sample are visible. One file per scenario."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmllm.data.samples import MODALITIES, Modality, Sample
from fedmllm.registry import Registry

Modalities = frozenset[Modality]
BOTH: Modalities = frozenset(MODALITIES)
IMAGE: Modalities = frozenset(("image",))
TEXT: Modalities = frozenset(("text",))
NONE: Modalities = frozenset()
Shares = Mapping[Modalities, float]
"""Visible modalities -> the share of samples that show exactly these."""


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
    keeps: Callable[[Sample, np.random.Generator], bool] | None = None
    """(sample, a generator that draws the same numbers as for `visible`) -> whether any client holds the sample. By default
    all samples are held. Decided before samples are distributed, so that every client gets its minimum."""
    coin_per_sample: bool = False
    """`clients` may give a client no modality. Such a client may hold every sample, and sees one modality of each: the toss of
    a coin decides for every sample anew."""
    expected: Callable[[Modalities, int], Shares] | None = None
    """(modalities of a sample, number of clients) -> the probability that it shows each subset of them, over all draws of
    clients and samples; what is missing to 1 is the probability that no client holds it. None if it is not known."""


scenarios: Registry[Scenario] = Registry("scenario", __name__)
