"""by-source: each natural owner's samples stay together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.partitions import Deal, GroupedDeal, indices_by_value, partitions
from fedmllm.data.partitions.iid import iid
from fedmllm.data.samples import Sample


@partitions.register("by-source")
def by_source() -> Deal:
    """Natural owners: the samples of one source stay together, and each source goes to the client that holds least so far.

    If there are fewer sources than clients, each source gets clients of its own in proportion to its size, which share it
    evenly. A source with images and texts goes to clients that have both modalities; if there are none, its images and its
    texts are separated.
    """

    def deal(samples: Sequence[Sample], clients: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
        sources = indices_by_value([s.source for s in samples])
        owner = np.empty(len(samples), dtype=np.int64)
        largest_first = sorted(sources, key=lambda name: (-len(sources[name]), name))
        if len(sources) >= len(clients):
            held = [(0, client) for client in sorted(clients)]  # a heap, with the client that holds least at its head
            for name in largest_first:
                count, client = held[0]
                owner[sources[name]] = client
                heapreplace(held, (count + len(sources[name]), client))
            return owner
        client_counts = _client_counts({name: len(indices) for name, indices in sources.items()}, len(clients))
        start = 0
        for name in largest_first:
            own, start = clients[start : start + client_counts[name]], start + client_counts[name]
            owner[sources[name]] = iid()(sources[name].tolist(), own, rng)
        return owner

    return GroupedDeal(deal, lambda sample: sample.source)


def _client_counts(sizes: Mapping[str, int], clients: int) -> dict[str, int]:
    """The number of clients for each source: one each, and every further client goes to the source with the most samples per
    client, on a tie to the last by name. Example: 40 and 20 samples and 6 clients give 4 and 2."""
    counts = dict.fromkeys(sizes, 1)
    heap = [(-float(sizes[name]), -rank, name) for rank, name in enumerate(sorted(sizes))]
    heapify(heap)
    for _ in range(clients - len(sizes)):
        _, rank, name = heap[0]
        counts[name] += 1
        heapreplace(heap, (-sizes[name] / counts[name], rank, name))
    return counts
