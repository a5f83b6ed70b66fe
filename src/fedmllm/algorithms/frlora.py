"""FRLoRA: Yan et al. 2025, "Federated Residual Low-Rank Adaption of Large Language Models" (ICLR 2025).

The adapter starts from the r largest singular values of each base weight, W₀ ≈ U Σ Vᵀ, and the base is reduced by them:

    B₀ = U √(Σ / s),   A₀ = √(Σ / s) Vᵀ,   base ← W₀ − s B₀ A₀

Every round clients train from (A₀, B₀), and the server folds what the means have changed into the base,

    base ← base + s (B̄ Ā − B₀ A₀) = base + s (B̄ − B₀) Ā + s B₀ (Ā − A₀),

which is not restricted to rank r over the rounds. A₀ and B₀ are sent, because the signs of singular vectors differ by machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, algorithms
from fedmllm.algorithms.factors import A, B, Factors, folded, lora_state, modules, rank_of
from fedmllm.algorithms.fedavg import Weighting, mean_adapter
from fedmllm.tensors import State


@algorithms.register("frlora")
def frlora(*, weighting: Weighting = "examples") -> Algorithm:
    """Start each round from the base weights' largest singular values and fold the mean change into the base (ICLR 2025)."""

    def message(state: State, client: int, info: RoundInfo) -> State:
        """Until the first round is over, the state has the adapter that leaves the model as it is."""
        return {group: state[group] for group in ("adapter", "fold")} if "fold" in state else info.adapter.principal()

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        mean, sent = mean_adapter(updates, weighting), message(state, -1, info)
        start, scale = sent["adapter"], info.adapter.scale(rank_of(mean))
        change: Factors = {}
        for m in modules(mean):
            (mean_a, mean_b), (a, b) = ((side[m + A].double(), side[m + B].double()) for side in (mean, start))
            change[m] = (scale * torch.cat((mean_b - b, b), dim=1), torch.cat((mean_a, mean_a - a)))
        return {**state, "adapter": start, "fold": folded(sent["fold"], change)}

    def uploads(state: State, client: int, info: RoundInfo) -> State:
        return {"adapter": message(state, client, info)["adapter"]}

    # An entry means the same in every round, but what a client did not send of one round is not part of the next one's base.
    return Algorithm(
        lora_state, aggregate, message=message, uploads=uploads, needs_lora=True, refactors=True, averages=weighting
    )
