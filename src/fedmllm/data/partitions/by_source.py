"""by-source: the natural owners of the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.partitions import Deal, Together, members_by_value, partitions
from fedmllm.data.partitions.iid import iid
from fedmllm.data.samples import Sample


@partitions.register("by-source")
def by_source() -> Deal:
    """Natural owners: a source's samples stay together, sources go to the clients that hold least so far.

    With fewer sources than clients, each source has clients of its own, in proportion to its size, that share it evenly. A
    source of pictures and of texts goes to clients that have both; where there are none, its pictures and its texts part.
    """

    def deal(samples: Sequence[Sample], clients: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
        sources = members_by_value([s.source for s in samples])
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
