"""The state that clients keep between rounds, on disk. One folder per client, created on its first saved state.

Finding a client's files does not involve those of other clients, so the cost of a round does not depend on how many clients
have taken part. Each file carries its round in its name and replaces no earlier file until the server's states after that round
and the next are safe: a run that is killed in between, or whose latest checkpoint is damaged, finds the earlier state.
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
    """The states of all clients below `folder`, one file per client and round."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _rounds(self, client: int) -> list[int]:
        matches = (_NAME.fullmatch(path.name) for path in self._path(client, 0).parent.glob("*"))
        return sorted(int(match.group(1)) for match in matches if match)

    def _path(self, client: int, round: int) -> Path:
        return self._folder / f"client-{client}" / f"round-{round}.safetensors"

    def load(self, client: int, round: int) -> State:
        """The client's latest state from before `round`; empty if there is none. Raises RunError if it is damaged."""
        earlier = [r for r in self._rounds(client) if r < round]
        return load_state(self._path(client, earlier[-1]))[0] if earlier else {}

    def save(self, client: int, round: int, state: State) -> None:
        """Save the client's state as of the end of `round`.

        An empty state is written only if it replaces an earlier one. A state with NaN or infinity is not written, because it
        would spoil every later round of the client.
        """
        if not all(bool(torch.isfinite(t).all()) for tensors in state.values() for t in tensors.values()):
            return
        if any(state.values()) or self._rounds(client):
            save_state(self._path(client, round), state)

    def forget(self, round: int, clients: Sequence[int]) -> None:
        """Delete the states of these clients from `round`; earlier ones stay."""
        for client in clients:
            self._path(client, round).unlink(missing_ok=True)

    def roll_back(self, client: int, last: int) -> None:
        """Discard the client's states of rounds after `last`. Earlier ones stay as far as the server may go back: to its
        state after round last − 2, if its latest checkpoint is not written yet and the one before turns out damaged."""
        for later in self._rounds(client):
            if later > last:
                self._path(client, later).unlink()
        self.commit(last - 2, [client])

    def commit(self, round: int, clients: Sequence[int]) -> None:
        """Delete the states that these clients no longer need once the server's state after `round` is safe."""
        for client in clients:
            kept = [r for r in self._rounds(client) if r <= round]
            for old in kept[:-1]:
                self._path(client, old).unlink()
