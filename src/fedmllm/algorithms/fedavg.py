"""FedAvg: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data" (1602.05629).

w ← w + η_g Σ_k p_k (w_k − w), with p_k = n_k / Σ n_j over the clients that sent an update. On LoRA this averages A and B
separately (FedIT, 2305.05644), which is not the average of the products B_k A_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, algorithms, in_order, positive
from fedmllm.tensors import State, Tensors, add, clone, scale, subtract, weighted_mean

Weighting = Literal["examples", "uniform"]


def weights_of(ordered: Sequence[Update], weighting: Weighting) -> list[float]:
    """The weight of each update: its examples, or 1. Not normalised."""
    return [float(u.examples) if weighting == "examples" else 1.0 for u in ordered]


def mean_adapter(updates: Sequence[Update], weighting: Weighting) -> Tensors:
    """Σ_k p_k w_k for the uploaded tensors, with p_k ∝ n_k or all equal."""
    ordered = in_order(updates)
    return weighted_mean([u.groups["adapter"] for u in ordered], weights_of(ordered, weighting))


def mean_change(state: State, updates: Sequence[Update], weighting: Weighting) -> Tensors:
    """Δ̄ = Σ_k p_k (w_k − w), with p_k ∝ n_k or all equal."""
    return subtract(mean_adapter(updates, weighting), state["adapter"])


@algorithms.register("fedavg")
def fedavg(*, server_lr: float = 1.0, weighting: Weighting = "examples") -> Algorithm:
    """Average the clients' adapters, weighted by their samples (1602.05629)."""
    positive(server_lr=server_lr)

    def init(adapter: Tensors) -> State:
        return {"adapter": clone(adapter)}

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        change = mean_change(state, updates, weighting)
        return {**state, "adapter": add(state["adapter"], scale(change, server_lr))}

    return Algorithm(init, aggregate, averages=weighting)
