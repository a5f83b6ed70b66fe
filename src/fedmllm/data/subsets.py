"""Draws of a part of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedmllm.data.samples import Sample
from fedmllm.data.stored import pick
from fedmllm.rng import stream


def draw_subset(
    samples: Sequence[Sample], count: int | None, names: Sequence[str], draw: int | None, balanced: bool = False
) -> Sequence[Sample]:
    """Draw `count` of the samples, in their order. The draw is that of `task.draw` and not of the seed, so that seeds share the
    data. With a `draw`, every label keeps its share; if `balanced`, all labels have equal shares."""
    if count is None or count >= len(samples):
        return samples
    rng = stream(draw or 0, "subset", *names)
    if draw is None and not balanced:
        return pick(samples, sorted(rng.choice(len(samples), size=count, replace=False).tolist()))
    return pick(samples, sorted(draw_stratified([s.label for s in samples], count, rng, balanced)))


def draw_stratified(labels: Sequence[str], count: int, rng: np.random.Generator, balanced: bool = False) -> list[int]:
    """The indices of `count` samples, of which each label has its share of all samples, up to rounding; if `balanced`, equally
    many samples of each label, or all of them if it has fewer."""
    order, totals, seen = rng.permutation(len(labels)).tolist(), Counter(labels), Counter[str]()
    position = {}
    for index in order:
        seen[labels[index]] += 1
        position[index] = (seen[labels[index]] - 0.5) / (1 if balanced else totals[labels[index]])
    return sorted(order, key=position.__getitem__)[:count]
