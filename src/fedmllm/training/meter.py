"""What is said about training while it goes on: whose it is, the loss, and the tokens a second."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from fedmllm.models.encoded import Encoded
from fedmllm.progress import ProgressCallback, no_progress

_PAUSE = 0.5
"""Seconds between two looks at the loss: reading a number from a GPU waits for it."""
_NAMED = 4


def clients_named(clients: Sequence[int]) -> str:
    """ "client 3", "clients 3, 5", or "clients 3, 5, 6 and 7 more"."""
    shown = clients if len(clients) <= _NAMED else clients[: _NAMED - 1]
    rest = f" and {len(clients) - len(shown)} more" if len(shown) < len(clients) else ""
    return f"client{'s' * (len(clients) > 1)} {', '.join(map(str, shown))}{rest}"


class Meter:
    """Calls `progress` before the first step of a cohort and after every step. `losses` has the sum over each client's samples
    so far; it is read a few times a second, and what is shown is the mean since the last time."""

    def __init__(self, progress: ProgressCallback, clients: Sequence[int], steps: int, losses: Tensor) -> None:
        self._progress, self._losses, self._steps = progress, losses, steps
        self._whose, self._note = clients_named(clients), ""
        self._began = self._looked = time.monotonic()
        self._samples = self._tokens = 0
        self._sum = 0.0
        if steps:
            progress("training", 0, steps, self._whose)

    def step(self, done: int, batches: Sequence[Sequence[Encoded]]) -> None:
        """`done` steps are made, the last one on `batches`."""
        if self._progress is no_progress:
            return
        self._samples += sum(map(len, batches))
        self._tokens += sum(sample.length for batch in batches for sample in batch)
        now = time.monotonic()
        if self._samples and (not self._note or now - self._looked >= _PAUSE):
            total = float(self._losses.sum())
            speed = self._tokens / max(now - self._began, 1e-9)
            self._note = f"{self._whose}  loss {(total - self._sum) / self._samples:.3f}  {speed:,.0f} tokens/s"
            self._looked, self._sum, self._samples = now, total, 0
        self._progress("training", done, self._steps, self._note)
