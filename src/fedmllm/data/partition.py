"""Who holds which sample: each partition deals a pool of samples out to the clients that may hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.samples import Sample
from fedmllm.registry import Registry

Deal = Callable[[Sequence[Sample], Sequence[int], np.random.Generator], NDArray[np.int64]]
"""(samples in the order of their ids, the clients that may hold them, a generator) -> the client of each sample."""


@dataclass(frozen=True)
class Together:
    """A deal that keeps samples of equal `key` together, whatever modalities they have."""

    deal: Deal
    key: Callable[[Sample], str]

    def __call__(self, samples: Sequence[Sample], clients: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
        return self.deal(samples, clients, rng)


partitions: Registry[Deal] = Registry("partition", __name__)


def _by_value(values: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    members: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        members.setdefault(value, []).append(index)
    return {value: np.array(members[value], dtype=np.int64) for value in sorted(members)}


@partitions.register("iid")
def iid() -> Deal:
    """Samples are shuffled and dealt out evenly: 10 samples to 3 clients give 4, 3 and 3."""

    def deal(samples: Sequence[Sample], clients: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
        seats = np.resize(np.array(clients, dtype=np.int64), len(samples))
        return rng.permutation(seats)

    return deal


@partitions.register("dirichlet")
def dirichlet(*, alpha: float = 0.5) -> Deal:
    """Label skew: each label's samples are shared out in proportions drawn from Dirichlet(alpha) (Hsu 2019, 1909.06335).

    With 3 clients, alpha = 100 gives each about a third of every label; alpha = 0.1 gives most of a label to one client.
    """
    if not alpha > 0:
        raise ValueError(f"alpha = {alpha} must be above 0")

    def deal(samples: Sequence[Sample], clients: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
        owner, takers = np.empty(len(samples), dtype=np.int64), np.array(clients, dtype=np.int64)
        for members in _by_value([s.label for s in samples]).values():
            shuffled = rng.permutation(members)
            shares = rng.dirichlet(np.full(len(takers), alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            owner[shuffled] = np.repeat(takers, np.diff(cuts, prepend=0, append=len(members)))
        return owner

    return deal


@partitions.register("by-source")
def by_source() -> Deal:
    """Natural owners: a source's samples stay together, sources go to the clients that hold least so far.

    With fewer sources than clients, each source has clients of its own, in proportion to its size, that share it evenly. A
    source of pictures and of texts goes to clients that have both; where there are none, its pictures and its texts part.
    """

    def deal(samples: Sequence[Sample], clients: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
        sources = _by_value([s.source for s in samples])
        owner = np.empty(len(samples), dtype=np.int64)
        largest_first = sorted(sources, key=lambda name: (-len(sources[name]), name))
        if len(sources) >= len(clients):
            held = [(0, client) for client in sorted(clients)]  # a heap: who holds least is at its head
            for name in largest_first:
                count, client = held[0]
                owner[sources[name]] = client
                heapreplace(held, (count + len(sources[name]), client))
            return owner
        seats = _seats({name: len(members) for name, members in sources.items()}, len(clients))
        taken = 0
        for name in largest_first:
            own, taken = clients[taken : taken + seats[name]], taken + seats[name]
            owner[sources[name]] = iid()(sources[name].tolist(), own, rng)
        return owner

    return Together(deal, lambda sample: sample.source)


def _seats(sizes: Mapping[str, int], clients: int) -> dict[str, int]:
    """Clients for each source: one, and each further one goes to the source with most samples a client, of equals to the
    last by name. 40 and 20 samples among 6 clients give 4 and 2."""
    seats = dict.fromkeys(sizes, 1)
    crowded = [(-float(sizes[name]), -place, name) for place, name in enumerate(sorted(sizes))]
    heapify(crowded)
    for _ in range(clients - len(sizes)):
        _, place, name = crowded[0]
        seats[name] += 1
        heapreplace(crowded, (-sizes[name] / seats[name], place, name))
    return seats
