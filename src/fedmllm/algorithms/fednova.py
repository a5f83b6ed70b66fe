"""FedNova: Wang et al. 2020, "Tackling the Objective Inconsistency Problem in … Federated Optimization" (2007.07481).

Under FedAvg, clients that take more local steps have more influence. FedNova divides each change by its own number of
effective steps and multiplies the mean by the average of those numbers:

    d_k = Δ_k / a_k,   a_eff = Σ_k p_k a_k,   w ← w + η_g a_eff Σ_k p_k d_k

a_k = τ_k for plain SGD and for AdamW (whose steps have about the same length for any gradient); for SGD with momentum ρ
a_k = (τ − ρ (1 − ρ^τ) / (1 − ρ)) / (1 − ρ). A client reports the a_k of the optimizer it used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedmllm.algorithms.base import Algorithm, LocalResult, RoundInfo, Update, algorithms, in_order, positive, send_adapter
from fedmllm.algorithms.fedavg import Weighting, fedavg, weights_of
from fedmllm.tensors import State, add, scale, subtract, weighted_mean


def effective_steps(steps: int, momentum: float) -> float:
    """a_k: the sum of the weights with which the gradients of `steps` steps enter the total change."""
    if not momentum:
        return float(steps)
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


@algorithms.register("fednova")
def fednova(*, server_lr: float = 1.0, weighting: Weighting = "examples") -> Algorithm:
    """Average changes per effective local step, so that busy clients do not dominate (2007.07481)."""
    positive(server_lr=server_lr)
    plain = fedavg(server_lr=server_lr, weighting=weighting)

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        ordered = in_order(updates)
        weights = weights_of(ordered, weighting)
        a = [float(u.groups["normaliser"]["a"]) for u in ordered]
        a_eff = sum(w * a_k for w, a_k in zip(weights, a, strict=True)) / sum(weights)
        changes = [
            scale(subtract(u.groups["adapter"], state["adapter"]), a_eff / a_k) for u, a_k in zip(ordered, a, strict=True)
        ]
        return {**state, "adapter": add(state["adapter"], scale(weighted_mean(changes, weights), server_lr))}

    def finish(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        upload, new_memory = send_adapter(result, received, memory, info)
        a = torch.tensor([effective_steps(result.steps, result.momentum)], dtype=torch.float32)
        return {**upload, "normaliser": {"a": a}}, new_memory

    def uploads(state: State, client: int, info: RoundInfo) -> State:
        return {"adapter": state["adapter"], "normaliser": {"a": torch.ones(1)}}

    def refuse(update: Update, state: State, info: RoundInfo) -> str | None:
        # Between that of plain SGD in one step and that of momentum 1; a change is divided by it.
        a, most = float(update.groups["normaliser"]["a"]), update.steps * (update.steps + 1) / 2
        return None if 0.99 <= a <= 1.01 * most else f"effective steps {a:g} do not result from {update.steps} steps"

    # Σ p_k a_eff Δ_k / a_k needs each Δ_k together with its a_k.
    return replace(plain, aggregate=aggregate, finish=finish, uploads=uploads, refuse=refuse, averages=None)
