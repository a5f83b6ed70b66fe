"""What to do when a GPU's memory is full: compute less at once, half as much each time, for the rest of the process."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from fedmllm.errors import RunError

T = TypeVar("T")
R = TypeVar("R")
_log = logging.getLogger(__name__)


class Limit:
    """How many of one kind ("clients in one pass") are computed at once; None: as many as are asked for."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.most: int | None = None
        self._tried = 0

    def size(self, wanted: int) -> int:
        """At most as many as `wanted`."""
        return wanted if self.most is None else min(self.most, wanted)

    def halve(self, tried: int) -> bool:
        """Compute at most half as many as were tried; False if that would be none."""
        if tried == 1:
            return False
        self._tried, self.most = self._tried or tried, tried // 2
        return True

    def finding(self) -> str:
        """What was found out since the last call, in one sentence; empty if nothing was."""
        tried, self._tried = self._tried, 0
        return f"the memory of the GPU does not hold {tried} {self.what}; from here on it is {self.most}" if tried else ""


class Limits:
    """The limits that the memory of one model's GPU has set so far. `tell` is called with a sentence about each."""

    def __init__(self) -> None:
        self.clients = Limit("clients in one pass")
        self.samples = Limit("samples of a client in one pass, whose gradients are accumulated")
        self.questions = Limit("questions in one pass")
        self.pictures = Limit("pictures in one pass of the vision tower")
        self.tell: Callable[[str], None] = _log.warning

    def in_parts(
        self, limit: Limit, items: Sequence[T], compute: Callable[[Sequence[T]], Sequence[R]], further: Callable[[], bool]
    ) -> Iterator[R]:
        """The results for the items, one for each. `compute` is called for as many of them as the limit allows.

        If memory is full, `compute` is called again for half as many, so it must leave nothing half done when it fails. If one
        item is too much, `further` makes it smaller in another way and says whether it could. Raises RunError if not.
        """
        done = 0
        while done < len(items):
            part = items[done : done + limit.size(len(items))]
            results = _unless_full(compute, part)
            if results is not None:
                for sentence in filter(None, (limit.finding(), self.samples.finding())):
                    self.tell(sentence)
                yield from results
                done += len(part)
            elif not limit.halve(len(part)) and not further():
                raise RunError(
                    "the memory of the GPU is full, with as little as possible computed at once; set train.checkpointing = "
                    'true or model.quantize = "4bit", lower train.max_length, or use a smaller model (`fedmllm check` says '
                    "what each takes)."
                )


def _unless_full(compute: Callable[[Sequence[T]], Sequence[R]], part: Sequence[T]) -> Sequence[R] | None:
    """None if memory is full. Only once this function has returned, nothing refers to the tensors of the failed attempt."""
    try:
        return compute(part)
    except torch.OutOfMemoryError:
        pass  # its traceback holds those tensors
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    return None
