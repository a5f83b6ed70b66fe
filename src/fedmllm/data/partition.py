"""Who holds which sample: each partition deals a pool of samples out to the clients that may hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.samples import Sample
from fedmllm.errors import DataError
from fedmllm.registry import Registry

Deal = Callable[[Sequence[Sample], Sequence[int], np.random.Generator], NDArray[np.int64]]
"""(samples in the order of their ids, the clients that may hold them, a generator) -> the client of each sample."""

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
        owner = np.empty(len(samples), dtype=np.int64)
        for members in _by_value([s.label for s in samples]).values():
            shuffled = rng.permutation(members)
            shares = rng.dirichlet([alpha] * len(clients))
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for client, part in zip(clients, np.split(shuffled, cuts), strict=True):
                owner[part] = client
        return owner

    return deal


@partitions.register("by-source")
def by_source() -> Deal:
    """Natural owners: a source's samples stay together, sources go to the clients that hold least so far.

    With fewer sources than clients, each source has clients of its own, in proportion to its size, that share it evenly.
    """

    def deal(samples: Sequence[Sample], clients: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
        sources = _by_value([s.source for s in samples])
        owner = np.empty(len(samples), dtype=np.int64)
        largest_first = sorted(sources, key=lambda name: (-len(sources[name]), name))
        if len(sources) >= len(clients):
            held = dict.fromkeys(clients, 0)
            for name in largest_first:
                client = min(held, key=lambda c: (held[c], c))
                owner[sources[name]] = client
                held[client] += len(sources[name])
            return owner
        seats = dict.fromkeys(largest_first, 1)
        for _ in range(len(clients) - len(sources)):
            crowded = max(seats, key=lambda name: (len(sources[name]) / seats[name], name))
            seats[crowded] += 1
        left = list(clients)
        for name in largest_first:
            own, left = left[: seats[name]], left[seats[name] :]
            owner[sources[name]] = iid()(sources[name].tolist(), own, rng)
        return owner

    return deal


def _pass_on(client: int, owner: NDArray[np.int64], eligible: Sequence[frozenset[int]], held: Counter[int], least: int) -> bool:
    """Bring `client` a sample along the shortest chain of clients that each give one and get one; False where there is none.

    A text-only client may need what a paired client cannot spare until it gets a picture from one that has pictures to spare.
    """
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
    """Move samples from the clients that hold most until every client holds at least `least`; nothing is dropped.

    `eligible[i]` are the clients that may hold sample `i`. Raises DataError where there are too few samples, or too few
    that a client may hold.
    """
    if clients * least > len(owner):
        raise DataError(
            f"partition.clients = {clients} with min_samples = {least} needs {clients * least} samples and there are "
            f"{len(owner)}; lower one of them or use more data."
        )
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
                raise DataError(
                    f"client {client} cannot be given min_samples = {least} samples that it may hold; "
                    "lower partition.clients or partition.min_samples."
                )
            moved = max(givers, key=lambda i: held[int(owner[i])])
            held[int(owner[moved])] -= 1
            held[client] += 1
            owner[moved] = client
    return owner
