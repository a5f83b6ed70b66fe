"""Give every client a minimum number of samples by moving as few samples as possible.

The result is defined by the two rules in `ensure_minimum`, which the tests check against a plain implementation. The running
time grows with the number of samples and moves, not with samples × clients. To that end, samples that the same clients may
hold form one kind (there are few kinds), and every search in the rules reads the head of a queue. Outdated entries of a queue
are discarded when they reach its head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from fedmllm.errors import DataError

Kinds = tuple[int, ...]
"""Numbers of kinds, ascending."""


def ensure_minimum(
    owner: NDArray[np.int64], eligible: Sequence[frozenset[int]], clients: int, least: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Move samples from the clients that hold the most until every client holds at least `least`; none is dropped.

    `owner[i]` is the client that holds sample `i`, and `eligible[i]` are the clients that may hold it. Clients below the
    minimum are served in ascending order. (1) A client takes a sample that it may hold from the client that holds the most;
    among several, the one that comes first in an order drawn from `rng`. (2) If no client can spare such a sample, samples
    are passed on along a chain of clients. Raises DataError if there are too few samples, or too few that a client may hold.
    """
    if clients * least > len(owner):
        raise DataError(
            f"partition.clients = {clients} with min_samples = {least} needs {clients * least} samples and there are "
            f"{len(owner)}; lower one of them or use more data."
        )
    order = rng.permutation(len(owner))
    below = np.flatnonzero(np.bincount(owner, minlength=clients) < least).tolist()
    if not below:
        return owner
    assignment = _Assignment(owner, eligible, clients, least, order)
    for client in below:
        while assignment.held[client] < least:
            if not (assignment.take_one(client) or assignment.take_along_chain(client)):
                raise DataError(
                    f"client {client} cannot be given min_samples = {least} samples that it may hold; "
                    "lower partition.clients or partition.min_samples."
                )
    return np.array(assignment.owner, dtype=np.int64)


class _Assignment:
    """Which client holds which sample. A client with more than `least` samples has a surplus: it only ever gives samples, and
    no client gains a surplus."""

    def __init__(
        self, owner: NDArray[np.int64], eligible: Sequence[frozenset[int]], clients: int, least: int, order: NDArray[np.int64]
    ) -> None:
        self.owner: list[int] = owner.tolist()
        self.held: list[int] = np.bincount(owner, minlength=clients).tolist()
        self._least = least
        self._order: list[int] = order.tolist()
        kinds: dict[frozenset[int], int] = {}
        # Looked up once per set object, because hashing and comparing a large set for every sample is slow.
        kind_of_object = {
            key: kinds.setdefault(able, len(kinds)) for key, able in {id(able): able for able in eligible}.items()
        }
        self._kind = [kind_of_object[id(able)] for able in eligible]
        self._eligible = list(kinds)  # by kind

    def _kinds(self, client: int) -> Kinds:
        """The kinds of samples that the client may hold."""
        return tuple(kind for kind, able in enumerate(self._eligible) if client in able)

    def _move(self, index: int, client: int) -> None:
        self.owner[index] = client
        if "_by_reach" in self.__dict__:  # built when the first chain is needed, and kept up to date from then on
            heappush(self._by_reach.setdefault((self._kind[index], self._reach[client]), []), index)

    def _update_counts(self, giver: int, client: int) -> None:
        """Record that `giver` has one sample less and `client` one more."""
        self.held[giver] -= 1
        self.held[client] += 1
        for kind in range(len(self._eligible)):
            self._offer(kind, giver)

    # Rule 1: take a sample from the client that holds the most

    @cached_property
    def _stock(self) -> dict[tuple[int, int], list[int]]:
        """(kind, client with a surplus) -> positions of its samples of that kind in the drawn order, descending."""
        stock: dict[tuple[int, int], list[int]] = {}
        for position in range(len(self._order) - 1, -1, -1):
            index = self._order[position]
            if self.held[self.owner[index]] > self._least:
                stock.setdefault((self._kind[index], self.owner[index]), []).append(position)
        return stock

    @cached_property
    def _offers(self) -> list[list[tuple[int, int, int]]]:
        """For each kind, a heap of (−samples held, position of the first sample, client with a surplus)."""
        offers: list[list[tuple[int, int, int]]] = [[] for _ in self._eligible]
        for (kind, client), positions in self._stock.items():
            offers[kind].append((-self.held[client], positions[-1], client))
        for heap in offers:
            heapify(heap)
        return offers

    def _offer(self, kind: int, client: int) -> None:
        positions = self._stock.get((kind, client), [])
        while positions and self.owner[self._order[positions[-1]]] != client:
            positions.pop()
        if positions and self.held[client] > self._least:
            heappush(self._offers[kind], (-self.held[client], positions[-1], client))

    def take_one(self, client: int) -> bool:
        """Move one sample from a client with a surplus to `client`; return False if none has a sample that it may hold."""
        candidates: list[tuple[int, int, int]] = []
        for kind in self._kinds(client):
            heap = self._offers[kind]
            while heap and self.held[heap[0][2]] != -heap[0][0]:  # out of date: the client has given a sample since
                heappop(heap)
            candidates += heap[:1]
        if not candidates:
            return False
        _, position, giver = min(candidates)
        self._move(self._order[position], client)
        self._update_counts(giver, client)
        return True

    # Rule 2: a chain, in which the client takes from one that takes from another, and so on up to one with a surplus

    @cached_property
    def _reach(self) -> list[Kinds]:
        """The kinds that each client may hold; equal tuples are one object."""
        known: dict[Kinds, Kinds] = {}
        return [known.setdefault(kinds, kinds) for kinds in map(self._kinds, range(len(self.held)))]

    @cached_property
    def _by_reach(self) -> dict[tuple[int, Kinds], list[int]]:
        """(kind, reach) -> a heap of the samples of that kind whose owners have that reach."""
        by_reach: dict[tuple[int, Kinds], list[int]] = {}
        for index, client in enumerate(self.owner):  # ascending, so each list is a heap
            by_reach.setdefault((self._kind[index], self._reach[client]), []).append(index)
        return by_reach

    @cached_property
    def _spare(self) -> list[list[int]]:
        """For each kind, the samples that clients with a surplus hold, descending."""
        spare: list[list[int]] = [[] for _ in self._eligible]
        for index in range(len(self.owner) - 1, -1, -1):
            if self.held[self.owner[index]] > self._least:
                spare[self._kind[index]].append(index)
        return spare

    def _first_spare(self, kinds: Kinds) -> int | None:
        """The first sample of these kinds that a client with a surplus holds."""
        for kind in kinds:
            spare = self._spare[kind]
            while spare and self.held[self.owner[spare[-1]]] <= self._least:
                spare.pop()
        return min((self._spare[kind][-1] for kind in kinds if self._spare[kind]), default=None)

    def _first_link(self, kinds: Kinds, known: set[int]) -> int | None:
        """The first sample of these kinds whose owner may hold a kind that is not in `known`."""
        candidates = []
        for (kind, reach), heap in self._by_reach.items():
            if kind in kinds and not known.issuperset(reach):
                while heap and self._reach[self.owner[heap[0]]] is not reach:
                    heappop(heap)
                candidates += heap[:1]
        return min(candidates, default=None)

    def take_along_chain(self, client: int) -> bool:
        """Move samples along the shortest chain of clients that ends at `client`; return False if there is none.

        Example: a text-only client needs a text that a paired client can give only after it has received an image from a
        client with images to spare. Among the shortest chains, the one with the lowest sample indices is used, link by link
        from `client`. This is a breadth-first search over clients, in which only a client that may hold a new kind leads
        further.
        """
        steps: list[tuple[Kinds, int, int]] = [(self._kinds(client), client, -1)]  # (new kinds, receiver, previous step)
        links = {client: -1}  # receiver -> the sample that it gives
        known = set(steps[0][0])
        for number, (kinds, _, _) in enumerate(steps):
            while (link := self._first_link(kinds, known)) is not None:
                receiver = self.owner[link]
                links[receiver] = link
                new = tuple(kind for kind in self._reach[receiver] if kind not in known)
                known.update(new)
                steps.append((new, receiver, number))
                if (spare := self._first_spare(new)) is not None:
                    self._move_along(spare, len(steps) - 1, steps, links)
                    return True
        return False

    def _move_along(self, index: int, number: int, steps: list[tuple[Kinds, int, int]], links: dict[int, int]) -> None:
        giver = self.owner[index]
        while number >= 0:
            _, receiver, previous = steps[number]
            self._move(index, receiver)
            index, number = links[receiver], previous
        self._update_counts(giver, steps[0][1])
