"""Give every client at least so many samples, by moving as few as are missing.

What is done is said by two rules, and tests hold a plain twin of them beside this file. The work grows with the samples and
the moves, not with samples × clients: samples that the same clients may hold are one kind, of which there are few, and each
question that the rules ask is answered by the head of a queue. An entry that no longer holds is thrown away when it comes up.
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
    """Move samples from the clients that hold most until every client holds at least `least`; nothing is dropped.

    `eligible[i]` are the clients that may hold sample `i`. Clients are served in the order of their numbers. Each takes
    from the one that holds most, of what it may hold, the sample that comes first in an order drawn from `rng`; where
    nobody can spare what it may hold, samples are passed on along a chain. Raises DataError where there are too few
    samples, or too few that a client may hold.
    """
    if clients * least > len(owner):
        raise DataError(
            f"partition.clients = {clients} with min_samples = {least} needs {clients * least} samples and there are "
            f"{len(owner)}; lower one of them or use more data."
        )
    order = rng.permutation(len(owner))
    table = _Table(owner, eligible, clients, least, order)
    for client in [client for client in range(clients) if table.held[client] < least]:
        while table.held[client] < least:
            if not (table.give(client) or table.pass_on(client)):
                raise DataError(
                    f"client {client} cannot be given min_samples = {least} samples that it may hold; "
                    "lower partition.clients or partition.min_samples."
                )
    return np.array(table.owner, dtype=np.int64)


class _Table:
    """Who holds what. A client with more than `least` is rich; it only ever gives, and none becomes rich."""

    def __init__(
        self, owner: NDArray[np.int64], eligible: Sequence[frozenset[int]], clients: int, least: int, order: NDArray[np.int64]
    ) -> None:
        self.owner: list[int] = owner.tolist()
        self.held: list[int] = np.bincount(owner, minlength=clients).tolist()
        self._least = least
        self._order: list[int] = order.tolist()
        numbers: dict[frozenset[int], int] = {}
        # Each object once: whether two large sets are equal is not asked for every sample.
        of_object = {number: numbers.setdefault(able, len(numbers)) for number, able in {id(a): a for a in eligible}.items()}
        self._kind = [of_object[id(able)] for able in eligible]
        self._able = list(numbers)

    def _kinds(self, client: int) -> Kinds:
        return tuple(kind for kind, able in enumerate(self._able) if client in able)

    def _move(self, index: int, client: int) -> None:
        self.owner[index] = client
        if "_first" in self.__dict__:  # made when something is first passed on, and kept up to date from then on
            heappush(self._first.setdefault((self._kind[index], self._reach[client]), []), index)

    def _count(self, giver: int, client: int) -> None:
        """`giver` has one sample less, `client` one more."""
        self.held[giver] -= 1
        self.held[client] += 1
        for kind in range(len(self._able)):
            self._offer(kind, giver)

    # A gift: the client takes from the one that holds most

    @cached_property
    def _stock(self) -> dict[tuple[int, int], list[int]]:
        """(kind, rich client) -> places in the drawn order of its samples of that kind, the first place last."""
        stock: dict[tuple[int, int], list[int]] = {}
        for place in range(len(self._order) - 1, -1, -1):
            index = self._order[place]
            if self.held[self.owner[index]] > self._least:
                stock.setdefault((self._kind[index], self.owner[index]), []).append(place)
        return stock

    @cached_property
    def _offers(self) -> list[list[tuple[int, int, int]]]:
        """For each kind a heap of (−samples held, place of the first, rich client): the next to give."""
        offers: list[list[tuple[int, int, int]]] = [[] for _ in self._able]
        for (kind, client), places in self._stock.items():
            offers[kind].append((-self.held[client], places[-1], client))
        for heap in offers:
            heapify(heap)
        return offers

    def _offer(self, kind: int, client: int) -> None:
        places = self._stock.get((kind, client), [])
        while places and self.owner[self._order[places[-1]]] != client:
            places.pop()
        if places and self.held[client] > self._least:
            heappush(self._offers[kind], (-self.held[client], places[-1], client))

    def give(self, client: int) -> bool:
        """Move one sample from a rich client to `client`; False where no rich client has one that it may hold."""
        best: list[tuple[int, int, int]] = []
        for kind in self._kinds(client):
            heap = self._offers[kind]
            while heap and self.held[heap[0][2]] != -heap[0][0]:  # it gave something since
                heappop(heap)
            best += heap[:1]
        if not best:
            return False
        _, place, giver = min(best)
        self._move(self._order[place], client)
        self._count(giver, client)
        return True

    # A chain: the client takes from one that takes from another, and so on up to a rich one

    @cached_property
    def _reach(self) -> list[Kinds]:
        """What each client may hold, equal ones as one object."""
        known: dict[Kinds, Kinds] = {}
        return [known.setdefault(kinds, kinds) for kinds in map(self._kinds, range(len(self.held)))]

    @cached_property
    def _first(self) -> dict[tuple[int, Kinds], list[int]]:
        """(kind, reach) -> a heap of the samples of that kind whose owners may hold the kinds in `reach`."""
        first: dict[tuple[int, Kinds], list[int]] = {}
        for index, client in enumerate(self.owner):  # ascending, so each list is a heap
            first.setdefault((self._kind[index], self._reach[client]), []).append(index)
        return first

    @cached_property
    def _spare(self) -> list[list[int]]:
        """For each kind the samples that rich clients hold, the first last."""
        spare: list[list[int]] = [[] for _ in self._able]
        for index in range(len(self.owner) - 1, -1, -1):
            if self.held[self.owner[index]] > self._least:
                spare[self._kind[index]].append(index)
        return spare

    def _first_spare(self, kinds: Kinds) -> int | None:
        """The first sample of these kinds that a rich client holds."""
        for kind in kinds:
            spare = self._spare[kind]
            while spare and self.held[self.owner[spare[-1]]] <= self._least:
                spare.pop()
        return min((self._spare[kind][-1] for kind in kinds if self._spare[kind]), default=None)

    def _first_link(self, kinds: Kinds, known: set[int]) -> int | None:
        """The first sample of these kinds whose owner may hold a kind that is not among the `known`."""
        found = []
        for (kind, reach), heap in self._first.items():
            if kind in kinds and not known.issuperset(reach):
                while heap and self._reach[self.owner[heap[0]]] is not reach:
                    heappop(heap)
                found += heap[:1]
        return min(found, default=None)

    def pass_on(self, client: int) -> bool:
        """Bring `client` a sample along the shortest chain of clients that each give one and get one; False without a chain.

        A text-only client may need what a paired client cannot spare until it gets a picture from one that has pictures to
        spare. Of chains of one length the one whose samples come first is taken, link by link from `client`: a search in
        breadth over clients, in which only one who may hold a kind not met before leads anywhere new.
        """
        steps: list[tuple[Kinds, int, int]] = [(self._kinds(client), client, -1)]  # (new kinds, who asks for them, step before)
        links = {client: -1}  # who asks -> the sample it gives
        known = set(steps[0][0])
        for number, (kinds, _, _) in enumerate(steps):
            while (link := self._first_link(kinds, known)) is not None:
                asking = self.owner[link]
                links[asking] = link
                new = tuple(kind for kind in self._reach[asking] if kind not in known)
                known.update(new)
                steps.append((new, asking, number))
                if (gift := self._first_spare(new)) is not None:
                    self._hand_down(gift, len(steps) - 1, steps, links)
                    return True
        return False

    def _hand_down(self, gift: int, number: int, steps: list[tuple[Kinds, int, int]], links: dict[int, int]) -> None:
        giver = self.owner[gift]
        while number >= 0:
            _, receiver, before = steps[number]
            self._move(gift, receiver)
            gift, number = links[receiver], before
        self._count(giver, steps[0][1])
