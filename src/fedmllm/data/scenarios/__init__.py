"""Scenarios: which modalities each client has, and which modalities of each sample are visible. One file per scenario."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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
Visible = Callable[[Sample, int, np.random.Generator], Modalities]
"""(sample, client that holds it, generator) -> the sample's modalities that are present there."""


def subsets(kind: Modalities) -> list[Modalities]:
    """The sets of modalities that a sample with `kind` may show, itself first."""
    return [shown for shown in (BOTH, IMAGE, TEXT, NONE) if shown <= kind]


def count_or_share(option: str, value: int | float) -> Callable[[int], int]:
    """A function from a number of clients to how many of them `value` means: a count, or the share that a float is.

    Raises ValueError, naming the option, for an impossible value; the function raises it for too many clients.
    """
    is_count = isinstance(value, int)
    if value < 0 or (not is_count and value > 1):
        raise ValueError(f"{option} = {value} must be a count, or a share between 0.0 and 1.0")

    def count(number: int) -> int:
        if is_count and value > number:
            raise ValueError(f"{option} = {value} is more than the number of clients, {number}")
        return int(value) if is_count else round(value * number)

    return count


def see_all(sample: Sample, client: int, rng: np.random.Generator) -> Modalities:
    """All modalities of the sample."""
    return sample.modalities


Noise = tuple[tuple[Modality, str, int], ...]
"""(modality, kind of corruption, severity) of what is visible of a sample and bad (`data.corruptions`)."""


class Change(NamedTuple):
    """From `round` on, until its next change, the client sees no modalities but these."""

    client: int
    round: int
    modalities: Modalities


@dataclass(frozen=True)
class Scenario:
    """How modalities are missing, on clients and in samples."""

    clients: Callable[[int, np.random.Generator], Sequence[Modalities]]
    """(number of clients, generator) -> the modalities that each client has, which decide which samples it may hold."""
    visible: Visible = see_all
    """What is present of a sample, before the modalities that the client lacks are removed. The generator belongs to the
    sample: its numbers depend neither on the client nor on other samples."""
    prepared: Callable[[Sequence[Sample], int, np.random.Generator], Visible] | None = None
    """(all training samples, number of clients, generator) -> what replaces `visible`, if it depends on draws for each client
    or on the classes that there are. Raises ValueError if the samples do not suit."""
    keeps: Callable[[Sample, np.random.Generator], bool] | None = None
    """(sample, a generator that draws the same numbers as for `visible`) -> whether any client holds the sample. By default
    all samples are held. Decided before samples are distributed, so that every client gets its minimum."""
    coin_per_sample: bool = False
    """`clients` may give a client no modality. Such a client may hold every sample, and sees one modality of each: the toss of
    a coin decides for every sample anew."""
    expected: Callable[[Modalities, int], Shares] | None = None
    """(modalities of a sample, number of clients) -> the probability that it shows each subset of them, over all draws of
    clients and samples; what is missing to 1 is the probability that no client holds it. None if it is not known."""
    noise: Callable[[Sample, Modalities, np.random.Generator], Noise] | None = None
    """(sample, what the client sees of it, a generator of the sample's own) -> how bad that is. By default nothing is bad."""
    changes: Callable[[int, int, np.random.Generator], Sequence[Change]] | None = None
    """(number of clients, number of rounds, generator) -> what clients may see from which round on, in any order. Before its
    first change, a client sees all that the rest of the scenario shows. Raises ValueError for numbers that do not suit."""
    then: tuple[Scenario, ...] = ()
    """Scenarios that are laid over this one (see `composed`)."""

    def seen(self, samples: Sequence[Sample], clients: int, rng: np.random.Generator) -> Visible:
        """`visible` for these samples and clients."""
        return self.visible if self.prepared is None else self.prepared(samples, clients, rng)


def composed(first: Scenario, then: Sequence[tuple[str, Scenario]]) -> Scenario:
    """`first` with further scenarios, named for messages, laid over it in this order: each removes modalities from what
    the client still sees of a sample. Only the first may decide what clients have and which samples are held.

    Raises ValueError for a later scenario that drops samples; the composition raises it for one whose clients lack modalities.
    """
    for name, later in then:
        if later.keeps is not None:
            raise ValueError(f"{name!r} drops samples, which only the first scenario may do; let it keep them, or put it first")

    def clients(number: int, rng: np.random.Generator) -> Sequence[Modalities]:
        for (name, later), own in zip(then, rng.spawn(len(then)), strict=True):
            if set(later.clients(number, own)) != {BOTH}:
                raise ValueError(f"{name!r} decides which modalities clients have, so it must be the first scenario")
        return first.clients(number, rng)

    def expected(kind: Modalities, number: int) -> Shares:
        shares: dict[Modalities, float] = {kind: 1.0}
        for part in (first, *(later for _, later in then)):
            assert part.expected is not None
            laid: dict[Modalities, float] = {}
            for before, probability in shares.items():
                for shown, share in part.expected(before, number).items():
                    laid[shown] = laid.get(shown, 0.0) + probability * share
            shares = laid
        return shares

    noises = [part.noise for part in (first, *(later for _, later in then)) if part.noise is not None]
    if len(noises) > 1:
        raise ValueError("two of the scenarios corrupt samples; leave one of them out")
    drifting = [part.changes for part in (first, *(later for _, later in then)) if part.changes is not None]
    if len(drifting) > 1:
        raise ValueError("two of the scenarios change over the rounds; leave one of them out")
    known = all(part.expected is not None for part in (first, *(later for _, later in then)))
    laid_over = tuple(later for _, later in then)
    return replace(
        first,
        clients=clients,
        expected=expected if known else None,
        noise=noises[0] if noises else None,
        changes=drifting[0] if drifting else None,
        then=laid_over,
    )


scenarios: Registry[Scenario] = Registry("scenario", __name__)
