"""FedAdagrad, FedYogi, FedAdam: Reddi et al. 2021, "Adaptive Federated Optimization" (2003.00295), Algorithm 2.

The mean change Δ̄ is the server's pseudo-gradient; no bias correction, v₀ = τ²:

    m ← β₁ m + (1 − β₁) Δ̄
    v ← v + Δ̄²                                 FedAdagrad, with β₁ = 0 by default
    v ← v − (1 − β₂) Δ̄² sign(v − Δ̄²)           FedYogi
    v ← β₂ v + (1 − β₂) Δ̄²                     FedAdam
    w ← w + η m / (√v + τ)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, algorithms, fraction, positive
from fedmllm.algorithms.fedavg import Weighting, mean_change
from fedmllm.tensors import State, Tensors, add, clone, scale, zeros_like

SecondMoment = Callable[[Tensor, Tensor], Tensor]
"""(v, Δ̄²) -> the next v."""


def _adaptive_server(second: SecondMoment, server_lr: float, beta1: float, tau: float, weighting: Weighting) -> Algorithm:
    positive(server_lr=server_lr, tau=tau)
    fraction(beta1=beta1)

    def init(adapter: Tensors) -> State:
        v = {name: torch.full_like(tensor, tau * tau) for name, tensor in adapter.items()}
        return {"adapter": clone(adapter), "m": zeros_like(adapter), "v": v}

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        change = mean_change(state, updates, weighting)
        m = add(scale(state["m"], beta1), scale(change, 1 - beta1))
        v = {name: second(state["v"][name], change[name].square()) for name in change}
        step = {name: server_lr * m[name] / (v[name].sqrt() + tau) for name in m}
        return {**state, "adapter": add(state["adapter"], step), "m": m, "v": v}

    return Algorithm(init, aggregate, averages=weighting)


@algorithms.register("fedadagrad")
def fedadagrad(
    *, server_lr: float = 1e-3, beta1: float = 0.0, tau: float = 1e-3, weighting: Weighting = "examples"
) -> Algorithm:
    """Adagrad on the server: steps shrink with the sum of all squared changes (2003.00295)."""
    return _adaptive_server(lambda v, square: v + square, server_lr, beta1, tau, weighting)


@algorithms.register("fedyogi")
def fedyogi(
    *,
    server_lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Yogi on the server: Adam with a bounded change of the second moment (2003.00295)."""
    fraction(beta2=beta2)

    def second(v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - beta2) * square * torch.sign(v - square)

    return _adaptive_server(second, server_lr, beta1, tau, weighting)


@algorithms.register("fedadam")
def fedadam(
    *,
    server_lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    weighting: Weighting = "examples",
) -> Algorithm:
    """Adam on the server, without bias correction (2003.00295)."""
    fraction(beta2=beta2)
    return _adaptive_server(lambda v, square: beta2 * v + (1 - beta2) * square, server_lr, beta1, tau, weighting)
