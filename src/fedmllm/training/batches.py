"""Assign samples to optimizer steps: in random order, but with samples of similar length in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_WINDOW = 4
"""Steps whose samples are sorted by length together: enough for little padding, few enough to stay random."""


@dataclass(frozen=True)
class EpochBatches:
    """`steps[i]` is one optimizer step: micro-batches of sample indices. `padding` is the share of padding in all tokens."""

    steps: list[list[list[int]]]
    padding: float


def batch_epoch(lengths: Sequence[int], batch_size: int, accumulate: int, rng: np.random.Generator) -> EpochBatches:
    """One epoch over `len(lengths)` samples.

    The samples of a step depend only on batch_size × accumulate, so 8 × 1 and 1 × 8 take the same steps.
    Every sample is used once. One step of the epoch may be smaller than the others.
    """
    size = batch_size * accumulate
    order = rng.permutation(len(lengths))
    steps: list[list[int]] = []
    for start in range(0, len(order), size * _WINDOW):
        window = sorted(order[start : start + size * _WINDOW].tolist(), key=lambda i: lengths[i])
        steps += [window[i : i + size] for i in range(0, len(window), size)]
    shuffled = [steps[int(i)] for i in rng.permutation(len(steps))]
    batched = [[step[i : i + batch_size] for i in range(0, len(step), batch_size)] for step in shuffled]
    slots = sum(len(batch) * max(lengths[i] for i in batch) for step in batched for batch in step)
    return EpochBatches(batched, 1.0 - sum(lengths) / slots if slots else 0.0)
