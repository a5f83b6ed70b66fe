"""Estimates that weigh whole updates by their distances from each other.

Krum and Multi-Krum: Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent"
(1703.02757). With f assumed attackers among n, the score of an update is the sum of its n − f − 2 smallest squared distances to
the others. Krum takes the update of the lowest score, Multi-Krum the mean of the m lowest. They withstand f clients if
n ≥ 2 f + 3, are unweighted by definition, and cost n² d.

Geometric median: Pillutla et al. 2022, "Robust Aggregation for Federated Learning" (RFA, 1912.13445):

    z = argmin Σ_k p_k ‖z − x_k‖;   Weiszfeld, smoothed: β_k = p_k / max(ν, ‖z − x_k‖),   z ← Σ β_k x_k / Σ β_k

It withstands clients of less than half of the weight. The authors make at most four steps, because each of theirs is a round of
communication; here steps are made between weights, from the Gram matrix, until they change no more. It costs n² d.

With `on = "product"` the distances are those of the products B_k A_k, which do not depend on how a change is divided between
the factors. The products are never formed; their distances cost r times as much. The resulting weights apply to the factors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedmllm.algorithms.base import not_negative, positive
from fedmllm.algorithms.combining import Robust, robusts
from fedmllm.algorithms.robust.estimates import Changes, Estimate, On, robust


@robusts.register("krum")
def krum(*, attackers: int = 1, on: On = "factors") -> Robust:
    """The one update that is nearest to its neighbours; withstands `attackers` of 2 · attackers + 3 clients (1703.02757).

    In a round of fewer updates, as many attackers are assumed as those allow.
    """
    return _krum(attackers, on, lambda n, f: 1, 1)


@robusts.register("multi-krum")
def multi_krum(*, attackers: int = 1, select: int = 0, on: On = "factors") -> Robust:
    """The mean of the `select` updates of the lowest Krum scores, of all but `attackers` if 0, unweighted (1703.02757).

    In a round of fewer updates, as many attackers are assumed as those allow, and never more updates are selected than all
    others.
    """
    not_negative(select=select)
    return _krum(attackers, on, lambda n, f: min(select or n, n - f), select + attackers)


def _krum(attackers: int, on: On, number: Callable[[int, int], int], least: int) -> Robust:
    not_negative(attackers=attackers)

    def estimate(changes: Changes) -> Estimate:
        n = len(changes.uploads)
        f = min(attackers, max(0, (n - 3) // 2))
        selected = number(n, f)
        best = krum_scores(changes.gram(on), f).argsort(stable=True)[:selected]
        weights = torch.zeros(n, dtype=torch.float64)
        weights[best] = 1 / selected
        return Estimate(changes.mean(weights), weights * n)

    return robust(estimate, least=max(2 * attackers + 3, least), instead="lower robust.attackers", products=on == "product")


def squared_distances(gram: Tensor) -> Tensor:
    """‖x_i − x_j‖²: (n, n)."""
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp(min=0).fill_diagonal_(0)


def krum_scores(gram: Tensor, attackers: int) -> Tensor:
    """The sum of the n − f − 2 smallest squared distances of each update to the others, of at least one: (n,)."""
    nearest = squared_distances(gram).sort(dim=1).values[:, 1:]  # the first is the update's own
    return nearest[:, : max(1, len(gram) - attackers - 2)].sum(1)


@robusts.register("geometric-median")
def geometric_median(*, smoothing: float = 1e-5, iterations: int = 1000, on: On = "factors") -> Robust:
    """The point of the smallest mean distance to the updates, weighted as the algorithm's mean; withstands half (1912.13445).

    Distances below `smoothing` count as that.
    """
    positive(smoothing=smoothing, iterations=iterations)

    def estimate(changes: Changes) -> Estimate:
        weights = weiszfeld(changes.gram(on), changes.weights, smoothing, iterations)
        return Estimate(changes.mean(weights), weights / changes.weights)

    return robust(estimate, products=on == "product")


def weiszfeld(gram: Tensor, start: Tensor, smoothing: float, iterations: int) -> Tensor:
    """The weights w: (n,) of the geometric median Σ_k w_k x_k of points with weights `start` and this Gram matrix: (n, n)."""

    def step(distances: Tensor, least: float = 0.0) -> Tensor:
        weights = start / distances.clamp(min=max(smoothing, least))
        return weights / weights.sum()

    # The first step is from the best of the points, because each step from far away, as from a mean that attackers moved, comes
    # nearer by the ratio of their weight to that of the others only.
    between = squared_distances(gram).sqrt()
    best = between[(between @ start).argmin()]
    weights = step(best, float(best.median()))
    for _ in range(iterations):
        products = gram @ weights
        after = step((weights @ products - 2 * products + gram.diagonal()).clamp(min=0).sqrt())
        converged = torch.allclose(after, weights, rtol=1e-9, atol=1e-15)
        weights = after
        if converged:
            break
    return weights
