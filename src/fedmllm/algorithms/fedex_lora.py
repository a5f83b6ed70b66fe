"""FedEx-LoRA: Singhal et al. 2024, "Exact Aggregation for Federated and Efficient Fine-Tuning …" (2410.09432).

Ā and B̄ are computed as in FedIT, and the residual of the products is folded into the base. Because Σ_k p_k (B_k − B̄) = 0,

    Σ_k p_k B_k A_k − B̄ Ā = Σ_k p_k (B_k − B̄) (A_k − Ā),

so the residual is sent as factors of rank S·r instead of a dense matrix, and nothing cancels in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, algorithms, groups, in_order
from fedmllm.algorithms.factors import A, B, Factors, fold_of, folded, lora_state, modules, rank_of
from fedmllm.algorithms.fedavg import Weighting, mean_adapter, weights_of
from fedmllm.tensors import State


@algorithms.register("fedex-lora")
def fedex_lora(*, weighting: Weighting = "examples") -> Algorithm:
    """Average A and B, and fold the residual of the products into the base (2410.09432)."""

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        ordered, mean = in_order(updates), mean_adapter(updates, weighting)
        weights = weights_of(ordered, weighting)
        scale = info.adapter.scale(rank_of(mean))
        residual: Factors = {}
        for m in modules(mean):
            # The means as they are sent, in float32: using them keeps the error at the size of that rounding.
            lefts = [scale * (u.groups["adapter"][m + B].double() - mean[m + B].double()) for u in ordered]
            rights = [
                (w / sum(weights)) * (u.groups["adapter"][m + A].double() - mean[m + A].double())
                for u, w in zip(ordered, weights, strict=True)
            ]
            residual[m] = (torch.cat(lefts, dim=1), torch.cat(rights, dim=0))
        return {**state, "adapter": mean, "fold": folded(fold_of(state), residual)}

    return Algorithm(lora_state, aggregate, message=groups("adapter", "fold"), needs_lora=True)
