"""Estimates of each entry on its own, by sorting the n values that it has.

Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (1803.01498). Both are unweighted by
definition: every client counts once, however many samples it has. They cost n d log n for the sorting.

Entries are estimated apart, so the result may be far from every single update, and they need honest clients that agree in each
entry: where few of them move an entry, as clients that see the only modality that uses it, their values are trimmed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmllm.algorithms.combining import Robust, robusts
from fedmllm.algorithms.robust.estimates import Changes, Estimate, robust


@robusts.register("median")
def median() -> Robust:
    """The median of each entry, unweighted; withstands fewer than half of the clients (1803.01498)."""
    return robust(lambda changes: _trimmed_mean(changes, (len(changes.uploads) - 1) // 2))


@robusts.register("trimmed-mean")
def trimmed_mean(*, share: float = 0.2) -> Robust:
    """The mean of each entry without a share of the values at each end, unweighted; withstands that share (1803.01498).

    ⌊share · n⌋ values are left out at each end, and at most as many as leave one or two.
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"share = {share} must be at least 0 and below 0.5, because it is left out at both ends")

    def estimate(changes: Changes) -> Estimate:
        n = len(changes.uploads)
        return _trimmed_mean(changes, min(_floor(share * n), (n - 1) // 2))

    least = 1 if share == 0 else math.ceil(1 / max(share, 1e-9) - 1e-9)  # of fewer, none is left out
    return robust(estimate, least=least, instead="raise robust.share")


def _floor(number: float) -> int:
    """⌊number⌋, with 0.29 · 100 as 29."""
    return math.floor(number + 1e-9)


def _trimmed_mean(changes: Changes, cut: int) -> Estimate:
    """The mean of each entry without the `cut` smallest and the `cut` largest values."""
    n = len(changes.uploads)
    used, entries = torch.zeros(n, dtype=torch.float64), 0

    def reduce(name: str, rows: Tensor) -> Tensor:
        nonlocal used, entries
        ordered = rows.sort(dim=0).values[cut : n - cut]
        used, entries = used + _uses(rows, ordered[0], ordered[-1], cut).sum(1), entries + rows.shape[1]
        return ordered.mean(0)

    change = changes.each(reduce)
    # Each of n − 2 cut values has the weight 1 / (n − 2 cut), and in the plain mean 1 / n.
    return Estimate(change, used / max(1, entries) * n / (n - 2 * cut))


def _uses(rows: Tensor, low: Tensor, high: Tensor, cut: int) -> Tensor:
    """Which of the values are between the cuts: (n, entries), 1 or 0. Of equal values of which only some are, each has the same
    share."""
    uses = ((rows > low) & (rows < high)).double()
    for end in (low, high):
        equal, before = rows == end, (rows < end).sum(0)
        inside = (before + equal.sum(0)).clamp(max=len(rows) - cut) - before.clamp(min=cut)
        uses = torch.where(equal, inside.double() / equal.sum(0), uses)
    return uses
