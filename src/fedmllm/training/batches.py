"""Which samples go into which optimizer step: shuffled, but neighbours in length share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_WINDOW = 4
"""Steps that are shuffled together before sorting by length: enough for short padding, little enough to stay random."""


@dataclass(frozen=True)
class EpochBatches:
    """`steps[i]` is one optimizer step: micro-batches of indices. `padding` is the share of token slots that are padding."""

    steps: list[list[list[int]]]
    padding: float


def batch_epoch(lengths: Sequence[int], batch_size: int, accumulate: int, rng: np.random.Generator) -> EpochBatches:
    """One epoch over `len(lengths)` samples.

    The samples of a step depend on batch_size × accumulate alone, so 8 × 1 and 1 × 8 take the same steps.
    Every sample is used once; the last step of the epoch may be smaller.
    """
    size = batch_size * accumulate
    order = rng.permutation(len(lengths))
    steps: list[list[int]] = []
    for start in range(0, len(order), size * _WINDOW):
        window = sorted(order[start : start + size * _WINDOW].tolist(), key=lambda i: lengths[i])
        steps += [window[i : i + size] for i in range(0, len(window), size)]
    shuffled = [steps[int(i)] for i in rng.permutation(len(steps))]
    cut = [[step[i : i + batch_size] for i in range(0, len(step), batch_size)] for step in shuffled]
    slots = sum(len(batch) * max(lengths[i] for i in batch) for step in cut for batch in step)
    return EpochBatches(cut, 1.0 - sum(lengths) / slots if slots else 0.0)
