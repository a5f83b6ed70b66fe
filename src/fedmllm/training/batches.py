"""Assign samples to optimizer steps: by a plain shuffle, or so that a step holds samples of similar length.

Either way a step holds as many samples of each modality pattern as chance gives. Sorting all samples by length together would
not do so: pictures lengthen a prompt, so whole steps would hold pictures alone or texts alone, and how a client drifts would
depend on how its batches are made.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedmllm.config import TrainTable
from fedmllm.models.encoded import Encoded

_WINDOW = 4
"""Steps whose samples are sorted by length together: enough for little padding, few enough to stay random."""


@dataclass(frozen=True)
class EpochBatches:
    """`steps[i]` is one optimizer step: micro-batches of sample indices. `padding` is the share of padding in all tokens."""

    steps: list[list[list[int]]]
    padding: float


def client_steps(
    samples: Sequence[Encoded], train: TrainTable, epochs: Iterable[np.random.Generator]
) -> list[list[list[Encoded]]]:
    """The steps of one client in one round: micro-batches of its samples, for one epoch per generator."""
    lengths = [sample.length for sample in samples]
    patterns = [sample.pattern for sample in samples] if train.batching == "by-length" else None
    batched = (batch_epoch(lengths, train.batch_size, train.accumulate, rng, patterns) for rng in epochs)
    return [[[samples[i] for i in batch] for batch in step] for epoch in batched for step in epoch.steps]


def batch_epoch(
    lengths: Sequence[int],
    batch_size: int,
    accumulate: int,
    rng: np.random.Generator,
    patterns: Sequence[Hashable] | None = None,
) -> EpochBatches:
    """One epoch over `len(lengths)` samples: a plain shuffle, or by length if `patterns` has each sample's modality pattern.

    The samples of a step depend only on batch_size × accumulate, so 8 × 1 and 1 × 8 take the same steps.
    Every sample is used once. One step of the epoch may be smaller than the others.
    """
    size = batch_size * accumulate
    order: list[int] = rng.permutation(len(lengths)).tolist()
    if patterns is not None:
        windows = (order[i : i + size * _WINDOW] for i in range(0, len(order), size * _WINDOW))
        order = [i for window in windows for i in _by_length(window, lengths, patterns)]
    steps = [order[i : i + size] for i in range(0, len(order), size)]
    if patterns is not None:  # within a window lengths grow from step to step
        steps = [steps[i] for i in rng.permutation(len(steps)).tolist()]
    batched = [[step[i : i + batch_size] for i in range(0, len(step), batch_size)] for step in steps]
    slots = sum(len(batch) * max(lengths[i] for i in batch) for step in batched for batch in step)
    return EpochBatches(batched, 1.0 - sum(lengths) / slots if slots else 0.0)


def _by_length(window: Sequence[int], lengths: Sequence[int], patterns: Sequence[Hashable]) -> list[int]:
    """The samples of each pattern sorted by length, in the places that this pattern has in the window."""
    members: dict[Hashable, list[int]] = {}
    for i in sorted(window, key=lambda i: -lengths[i]):
        members.setdefault(patterns[i], []).append(i)
    return [members[patterns[i]].pop() for i in window]
