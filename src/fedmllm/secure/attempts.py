"""Which clients' updates were summed when a client last answered "unmask" for a round: what it must remember on disk.

If a round is attempted again, after a crash or with `--resume`, clients send the same vectors under new masks. Two sums of the
same vectors over different sets of clients would give the server their difference, which may be one client's update. A client
therefore helps to unmask a second sum of a round only if it is over the same clients as the first.

It suffices that a client is bound from the moment it answers "unmask": a sum needs the answers of more than half of the holders
of every secret in it, so of two sums that both became known, one holder of every such secret has seen both lists. On a sparse
graph a client that was not in the first sum has no secret in it; docs/privacy.md says when its neighbours protect it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from fedmllm.algorithms import RoundInfo
from fedmllm.storage.atomic import write_atomically
from fedmllm.tensors import State, digest, flatten


class Attempts:
    """The memory of one site, a small file per round below `folder`. `experiment` is the text of the experiment file.

    A round is known by its run and number, and by what it starts from: the same experiment in a new run, or a run that was
    started anew after its folder was lost, has other names and leads to the same updates.
    """

    def __init__(self, folder: Path, experiment: str) -> None:
        self._folder, self._experiment = folder, experiment

    def by_name(self, run: str, info: RoundInfo, client: int) -> Path:
        return self._path("name", run, info.round, client)

    def by_start(self, info: RoundInfo, client: int, received: State) -> Path:
        return self._path("start", self._experiment, info.round, client, info.lr, digest(flatten(received)))

    def _path(self, *parts: object) -> Path:
        return self._folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"

    @staticmethod
    def earlier(path: Path) -> frozenset[int] | None:
        """The clients in the sum of an earlier attempt, as far as this client shares masks with them; None if there was none.

        Raises ValueError for a damaged file.
        """
        try:
            clients = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            clients = None
        if not isinstance(clients, list):
            raise ValueError(
                f"secure aggregation: the site's record of earlier attempts is damaged ({path.name}); only a new run with "
                "another seed is safe"
            )
        return frozenset(clients)

    @staticmethod
    def remember(path: Path, clients: Collection[int]) -> None:
        """Written and flushed before the answer is sent."""
        write_atomically(path, json.dumps(sorted(clients)).encode())
