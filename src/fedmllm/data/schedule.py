"""What each client may see in each round, if that changes."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from fedmllm.data.samples import MODALITIES
from fedmllm.data.scenarios import BOTH, Change, Modalities


@dataclass(frozen=True)
class Schedule:
    """`changes` sorted by client and round, without those that change nothing, over `rounds` rounds. Empty: nothing changes."""

    changes: tuple[Change, ...] = ()
    rounds: int = 1

    @classmethod
    def of(cls, changes: Iterable[Change], rounds: int) -> Schedule:
        """A schedule of these changes, in any order."""
        kept: list[Change] = []
        for change in sorted(changes, key=lambda c: (c.client, c.round)):
            before = kept[-1].modalities if kept and kept[-1].client == change.client else BOTH
            if change.modalities != before:
                kept.append(change)
        return cls(tuple(kept), rounds)

    @cached_property
    def _by_client(self) -> dict[int, tuple[list[int], list[Modalities]]]:
        """client -> (the rounds of its changes, what it may see from each of them on)."""
        by_client: dict[int, tuple[list[int], list[Modalities]]] = {}
        for client, number, modalities in self.changes:
            rounds, seen = by_client.setdefault(client, ([], []))
            rounds.append(number)
            seen.append(modalities)
        return by_client

    def visible(self, client: int, done: int, of: int | None = None) -> Modalities:
        """What the client may see after `done` of `of` rounds; a run of another number of rounds passes through the schedule at
        its own speed."""
        if client not in self._by_client:
            return BOTH
        rounds, seen = self._by_client[client]
        position = bisect_right(rounds, done * self.rounds // (of or self.rounds)) - 1
        return seen[position] if position >= 0 else BOTH

    def stretches(self, client: int) -> Iterator[tuple[int, int, Modalities]]:
        """(first round, number of rounds, what the client may see) of every stretch in which it does not change."""
        starts = sorted({0, *self._by_client.get(client, ([], []))[0]})
        for start, end in zip(starts, [*starts[1:], self.rounds], strict=True):
            yield start, end - start, self.visible(client, start)

    def to_json(self) -> str:
        """{"rounds": …, "changes": [[client, round, [modalities]], …]}; empty if nothing changes."""
        if not self.changes:
            return ""
        changes = [[client, number, sorted(modalities)] for client, number, modalities in self.changes]
        return json.dumps({"rounds": self.rounds, "changes": changes}, separators=(",", ":"))

    @classmethod
    def of_json(cls, text: str) -> Schedule:
        """Raises ValueError if the text is no schedule."""
        if not text:
            return cls()
        try:
            raw = json.loads(text)
            changes = [
                Change(int(client), int(number), frozenset(m for m in MODALITIES if m in seen))
                for client, number, seen in raw["changes"]
            ]
            return cls.of(changes, int(raw["rounds"]))
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"no schedule ({error})") from None


NOTHING_CHANGES = Schedule()
