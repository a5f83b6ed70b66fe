"""Estimates that limit the length of each update.

Norm clipping: Sun et al. 2019, "Can You Really Backdoor Federated Learning?" (1911.07963): x_k · min(1, τ / ‖x_k‖). It bounds
what a client can add, τ times its weight in the mean, and nothing else: many attackers, or one in every round, still move the
model. With a fixed τ it has this bound for any number of attackers, with the round's median for fewer than half.

Centred clipping: Karimireddy et al. 2021, "Learning from History for Byzantine Robust Optimization" (2012.10333):

    v ← v + Σ_k p_k (x_k − v) min(1, τ / ‖x_k − v‖),   v at first the estimate of the round before

It bounds the difference from the last round's estimate instead, so an attacker must be consistent over rounds. It withstands
clients of less than half of the weight. The authors' τ is fixed, and so is ours if `bound` is set.

Both cost n d, twice that of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, not_negative, positive
from fedmllm.algorithms.combining import Combined, Robust, as_upload, robusts
from fedmllm.algorithms.robust.estimates import Changes, Estimate, robust
from fedmllm.algorithms.screening import changes_of
from fedmllm.tensors import State, Tensors, norm, scale, zeros_like


@robusts.register("norm-clip")
def norm_clip(*, bound: float = 0.0, factor: float = 1.0) -> Robust:
    """Shorten longer updates to `bound`, or if it is 0 to `factor` times the round's median length (1911.07963).

    An update is shortened as a whole, until none of its groups is too long. `bound` holds for the adapter; control variates,
    which are of another size, always have the median's.
    """
    not_negative(bound=bound)
    positive(factor=factor)

    def combine(updates: Sequence[Update], algorithm: Algorithm, state: State, info: RoundInfo) -> Combined:
        changes = {update.client: changes_of(update, algorithm, state, info) for update in updates}
        lengths = {client: {group: norm(t) for group, t in change.items()} for client, change in changes.items()}
        groups = lengths[updates[0].client]
        limits = {group: factor * median(by_group[group] for by_group in lengths.values()) for group in groups}
        limits |= {"adapter": bound} if bound else {}
        kept = {client: min(limits[g] / n if n > limits[g] else 1.0 for g, n in by.items()) for client, by in lengths.items()}
        shortened: list[Update] = []
        for update in updates:
            restored = algorithm.restored(update, state, info)
            if kept[update.client] < 1:
                change = {group: scale(tensors, kept[update.client]) for group, tensors in changes[update.client].items()}
                upload = as_upload(change, algorithm.message(state, update.client, info), restored.groups)
                restored = replace(restored, groups={**restored.groups, **upload})
            shortened.append(restored)
        return Combined(shortened, kept)

    return Robust(combine, mean_only=False)


@robusts.register("centered-clip")
def centered_clip(*, bound: float = 0.0, factor: float = 1.0, iterations: int = 1) -> Robust:
    """Shorten the differences from the last round's estimate, weighted as the algorithm's mean (2012.10333).

    To `bound`, or if it is 0 to `factor` times their median length. The estimate before the first round is 0.
    """
    not_negative(bound=bound)
    positive(factor=factor, iterations=iterations)

    def estimate(changes: Changes) -> Estimate:
        centre = {**zeros_like(changes.uploads[0]), **{n: t for n, t in changes.previous.items() if n in changes.uploads[0]}}
        shares = torch.ones(len(changes.uploads), dtype=torch.float64)
        for _ in range(iterations):
            lengths = _lengths(changes, centre)
            limit = bound or factor * median(lengths.tolist())
            shares = torch.where(lengths > limit, limit / lengths, 1.0)
            centre = _moved(changes, centre, shares)
        return Estimate(centre, shares)

    return robust(estimate, remembers=True)


def _lengths(changes: Changes, centre: Tensors) -> torch.Tensor:
    """‖x_k − centre‖: (n,)."""
    squares = torch.zeros(len(changes.uploads), dtype=torch.float64)
    for name in sorted(centre):
        squares += (changes.rows(name) - centre[name].double().flatten()).square().sum(1)
    return squares.sqrt()


def _moved(changes: Changes, centre: Tensors, shares: torch.Tensor) -> Tensors:
    """centre + Σ_k p_k shares_k (x_k − centre)."""
    weights = changes.weights * shares
    return changes.each(lambda name, rows: (1 - weights.sum()) * centre[name].double().flatten() + weights @ rows)
