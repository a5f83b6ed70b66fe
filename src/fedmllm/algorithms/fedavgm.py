"""FedAvgM: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution …" (1909.06335).

m ← β m + Δ̄,   w ← w + η_g m
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, algorithms, fraction, positive
from fedmllm.algorithms.fedavg import Weighting, mean_change
from fedmllm.tensors import State, Tensors, add, clone, scale, zeros_like


@algorithms.register("fedavgm")
def fedavgm(*, server_lr: float = 1.0, momentum: float = 0.9, weighting: Weighting = "examples") -> Algorithm:
    """FedAvg with momentum on the server (1909.06335)."""
    positive(server_lr=server_lr)
    fraction(momentum=momentum)

    def init(adapter: Tensors) -> State:
        return {"adapter": clone(adapter), "m": zeros_like(adapter)}

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        m = add(scale(state["m"], momentum), mean_change(state, updates, weighting))
        return {**state, "adapter": add(state["adapter"], scale(m, server_lr)), "m": m}

    return Algorithm(init, aggregate, averages=weighting)
