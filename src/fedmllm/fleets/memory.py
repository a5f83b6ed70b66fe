"""What clients remember between rounds, on disk: a folder a client, made for those who took part and remember something.

One client's files are found without looking at those of others, so a round costs the same however many clients have been
there. A file carries its round in its name and replaces nothing until the server's state of that round is safe, so a run killed
between the two finds the memory from before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from fedmllm.storage.state_file import load_state, save_state
from fedmllm.tensors import State

_NAME = re.compile(r"round-(\d+)\.safetensors")


class ClientMemory:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _rounds(self, client: int) -> list[int]:
        try:
            names = [path.name for path in self._of(client).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(int(match.group(1)) for match in map(_NAME.fullmatch, names) if match)

    def _of(self, client: int) -> Path:
        return self._folder / f"client-{client}"

    def _path(self, client: int, round: int) -> Path:
        return self._of(client) / f"round-{round}.safetensors"

    def load(self, client: int, round: int) -> State:
        """What the client remembered before `round`; empty where it never took part or remembers nothing."""
        earlier = [r for r in self._rounds(client) if r < round]
        return load_state(self._path(client, earlier[-1]))[0] if earlier else {}

    def save(self, client: int, round: int, state: State) -> None:
        """Remember `state` as of the end of `round`. Nothing is written for clients that never remember anything, and no NaN
        or infinity: it would spoil every later round of the client."""
        if not all(bool(torch.isfinite(t).all()) for tensors in state.values() for t in tensors.values()):
            return
        if any(state.values()) or self._rounds(client):
            save_state(self._path(client, round), state)

    def forget(self, round: int, clients: Sequence[int]) -> None:
        """What these clients remembered of `round` goes; what they remembered before it stays."""
        for client in clients:
            self._path(client, round).unlink(missing_ok=True)

    def go_back(self, client: int, last: int) -> None:
        """Nothing is kept but what the client remembered at the end of round `last`."""
        for later in self._rounds(client):
            if later > last:
                self._path(client, later).unlink()
        self.commit(last, [client])

    def commit(self, round: int, clients: list[int]) -> None:
        """The server is past `round`: what these clients remembered before it is not needed any more."""
        for client in clients:
            kept = [r for r in self._rounds(client) if r <= round]
            for old in kept[:-1]:
                self._path(client, old).unlink()
