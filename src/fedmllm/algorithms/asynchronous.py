"""Asynchronous rounds: the server makes a step as soon as some updates have arrived, and clients train on.

The staleness τ of an update is the number of the server's steps since its client was sent the model. With w the server's
adapter now and w₀ what the client was sent,

    FedBuff, after K updates:   w ← w + mean of s(τ_k) (w_k − w₀)       Nguyen et al. 2022 (2106.06639)
    FedAsync, after each:       w ← (1 − α s(τ)) w + α s(τ) w_k         Xie et al. 2019 (1903.03934)

    s(τ) = 1 (constant), (1 + τ)^−a (polynomial), or 1 for τ ≤ b and else 1 / (a (τ − b) + 1) (hinge)

Both are given to the algorithm as updates from w, such as w + s(τ_k) (w_k − w₀), so that its own weights, server learning rate
and server optimizer apply. FedBuff's paper weighs clients alike (`algorithm.weighting = "uniform"`), and FedAsync's clients
train with FedProx's term (`regularization.name = "fedprox"`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from fedmllm.algorithms.base import Update, not_negative
from fedmllm.registry import Registry
from fedmllm.tensors import Tensors, add, scale, subtract

Staleness = Literal["constant", "polynomial", "hinge"]


@dataclass(frozen=True)
class Asynchronous:
    """The server makes a step after `buffer` updates. `weight(τ)` is at most 1. With `mixes`, an update is mixed with the
    server's adapter; otherwise its change is added to it."""

    buffer: int
    weight: Callable[[int], float]
    mixes: bool = False

    def rebased(self, update: Update, staleness: int, now: Tensors, sent: Tensors) -> Update:
        """The update as if its client had started from the server's adapter `now` instead of from `sent`. One with a problem
        stays as it is."""
        if update.problem:
            return update
        weight, trained = self.weight(staleness), update.groups["adapter"]
        if weight == 1.0 and (self.mixes or staleness == 0):
            return update  # exactly, where w + (w_k − w) would round
        current = {name: now[name] for name in trained}
        start = current if self.mixes else {name: sent[name] for name in trained}
        return replace(update, groups={"adapter": add(current, scale(subtract(trained, start), weight))})


asynchronies: Registry[Asynchronous | None] = Registry("asynchronous", "fedmllm.algorithms.asynchronous")


def staleness_weight(kind: Staleness, a: float | None, b: int) -> Callable[[int], float]:
    """s(τ). Unless set, a is 0.5 if polynomial and 10 if hinge."""
    slope = a if a is not None else 10.0 if kind == "hinge" else 0.5
    not_negative(a=slope, b=b)
    if kind == "hinge":
        return lambda tau: 1.0 if tau <= b else 1.0 / (slope * (tau - b) + 1.0)
    return lambda tau: (1.0 + tau) ** (-slope if kind == "polynomial" else 0.0)


@asynchronies.register("none")
def no_asynchronous() -> None:
    """Synchronous rounds: the server waits for the clients that it sampled."""


@asynchronies.register("fedbuff")
def fedbuff(*, buffer: int = 10, staleness: Staleness = "polynomial", a: float | None = None, b: int = 4) -> Asynchronous:
    """A step after `buffer` updates, each weighted down by its staleness (2106.06639)."""
    if buffer < 1:
        raise ValueError(f"buffer = {buffer} must be at least 1")
    return Asynchronous(buffer, staleness_weight(staleness, a, b))


@asynchronies.register("fedasync")
def fedasync(*, alpha: float = 0.6, staleness: Staleness = "polynomial", a: float | None = None, b: int = 4) -> Asynchronous:
    """A step after every update, which is mixed with the server's adapter (1903.03934)."""
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha = {alpha} must be above 0 and at most 1")
    weight = staleness_weight(staleness, a, b)
    return Asynchronous(1, lambda tau: alpha * weight(tau), mixes=True)
