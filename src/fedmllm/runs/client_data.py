"""The encoded samples of clients, as far as runs have asked for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from fedmllm.algorithms import RoundInfo
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.scenarios import BOTH, Modalities
from fedmllm.data.summary import gaps
from fedmllm.fleets.base import InRound
from fedmllm.models.encoded import Encoded


class ClientData(Mapping[int, list[Encoded]]):
    """client -> its encoded samples. A client is encoded on first access, so the cost of a run depends on the clients that
    take part in it, not on the number of clients. Iterating over the values encodes everything."""

    def __init__(self, manifest: Manifest, encode: Callable[[Sequence[Holding]], list[Encoded]]) -> None:
        self.manifest = manifest
        self._encode = encode
        self._encoded: dict[int, list[Encoded]] = {}
        self._in_phase: dict[tuple[int, Modalities], tuple[list[Encoded], float]] = {}

    def __getitem__(self, client: int) -> list[Encoded]:
        if client not in self:
            raise KeyError(client)
        if client not in self._encoded:
            self._encoded[client] = self._encode(self.manifest.of_client(client))
        return self._encoded[client]

    @property
    def changing(self) -> InRound | None:
        """What clients see in each round, if that changes."""
        return self._in_round if self.manifest.schedule.changes else None

    def _in_round(self, client: int, info: RoundInfo) -> tuple[list[Encoded], float]:
        """The client's samples as it sees them in a round of a scenario that changes, and the share of its modality slots that
        are then empty."""
        seen = self.manifest.schedule.visible(client, info.round, info.rounds)
        if (client, seen) not in self._in_phase:
            holdings = [replace(h, visible=h.visible & seen) for h in self.manifest.of_client(client)]
            limited = Manifest.of(holdings, self.manifest.clients)
            self._in_phase[client, seen] = (self[client] if seen == BOTH else self._encode(holdings)), gaps(limited)[client]
        return self._in_phase[client, seen]

    def __contains__(self, client: object) -> bool:
        return isinstance(client, int) and 0 <= client < self.manifest.clients

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.manifest.clients))

    def __len__(self) -> int:
        return self.manifest.clients
