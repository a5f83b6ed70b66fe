"""FedAvgM: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution …" (1909.06335).

m ← β m + (1 − d) Δ̄,   w ← w + η_g m

The dampening d is 0 in the paper. As in PyTorch's SGD it spares the first round, in which m is Δ̄ itself; d = β then gives the
moving average of the code published with FedMLLM (2411.14717).
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, algorithms, fraction, positive
from fedmllm.algorithms.fedavg import Weighting, mean_change
from fedmllm.tensors import State, Tensors, add, clone, scale, zeros_like


@algorithms.register("fedavgm")
def fedavgm(
    *, server_lr: float = 1.0, momentum: float = 0.9, dampening: float = 0.0, weighting: Weighting = "examples"
) -> Algorithm:
    """FedAvg with momentum on the server (1909.06335)."""
    positive(server_lr=server_lr)
    fraction(momentum=momentum, dampening=dampening)

    def init(adapter: Tensors) -> State:
        return {"adapter": clone(adapter), "m": zeros_like(adapter)}

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        undamped = 1 - dampening if info.round > 0 else 1.0
        m = add(scale(state["m"], momentum), scale(mean_change(state, updates, weighting), undamped))
        return {**state, "adapter": add(state["adapter"], scale(m, server_lr)), "m": m}

    return Algorithm(init, aggregate, averages=weighting)
