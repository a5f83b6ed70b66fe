"""Plain twins of optimised functions: short implementations with the same results, however slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.samples import Sample
from fedmllm.errors import DataError


def _pass_on(client: int, owner: NDArray[np.int64], eligible: Sequence[frozenset[int]], held: Counter[int], least: int) -> bool:
    gives: dict[int, tuple[int, int]] = {}  # a client in the chain -> (the sample it gives, to whom)
    queue = [client]
    for receiver in queue:
        for index, giver in enumerate(owner.tolist()):
            if giver == client or giver in gives or receiver not in eligible[index]:
                continue
            gives[giver] = (index, receiver)
            queue.append(giver)
            if held[giver] > least:
                held[giver] -= 1
                held[client] += 1
                while giver != client:
                    index, giver = gives[giver]
                    owner[index] = giver
                return True
    return False


def ensure_minimum(
    owner: NDArray[np.int64], eligible: Sequence[frozenset[int]], clients: int, least: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    if clients * least > len(owner):
        raise DataError("too few samples")
    owner = owner.copy()
    held = Counter(dict.fromkeys(range(clients), 0))
    held.update(owner.tolist())
    order = rng.permutation(len(owner))
    for client in range(clients):
        while held[client] < least:
            givers = [int(i) for i in order if client in eligible[i] and held[int(owner[i])] > least]
            if not givers and _pass_on(client, owner, eligible, held, least):
                continue
            if not givers:
                raise DataError(f"client {client} cannot be given what it may hold")
            moved = max(givers, key=lambda i: held[int(owner[i])])
            held[int(owner[moved])] -= 1
            held[client] += 1
            owner[moved] = client
    return owner


def _members(values: Sequence[str]) -> dict[str, list[int]]:
    return {value: [i for i, other in enumerate(values) if other == value] for value in sorted(set(values))}


def dirichlet(samples: Sequence[Sample], clients: Sequence[int], rng: np.random.Generator, alpha: float) -> list[int]:
    owner = np.empty(len(samples), dtype=np.int64)
    for members in _members([s.label for s in samples]).values():
        shuffled = rng.permutation(members)
        shares = rng.dirichlet([alpha] * len(clients))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for client, part in zip(clients, np.split(shuffled, cuts), strict=True):
            owner[part] = client
    return owner.tolist()


def by_source(samples: Sequence[Sample], clients: Sequence[int], rng: np.random.Generator) -> list[int]:
    sources = _members([s.source for s in samples])
    owner = np.empty(len(samples), dtype=np.int64)
    largest_first = sorted(sources, key=lambda name: (-len(sources[name]), name))
    if len(sources) >= len(clients):
        held = dict.fromkeys(clients, 0)
        for name in largest_first:
            client = min(held, key=lambda c: (held[c], c))
            owner[sources[name]] = client
            held[client] += len(sources[name])
        return owner.tolist()
    seats = dict.fromkeys(largest_first, 1)
    for _ in range(len(clients) - len(sources)):
        crowded = max(seats, key=lambda name: (len(sources[name]) / seats[name], name))
        seats[crowded] += 1
    left = list(clients)
    for name in largest_first:
        own, left = left[: seats[name]], left[seats[name] :]
        owner[sources[name]] = rng.permutation(np.resize(np.array(own, dtype=np.int64), len(sources[name])))
    return owner.tolist()
