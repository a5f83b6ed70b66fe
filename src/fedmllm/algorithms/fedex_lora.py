"""FedEx-LoRA: Singhal et al. 2024, "Exact Aggregation for Federated and Efficient Fine-Tuning …" (2410.09432).

Ā and B̄ are computed as in FedIT, and the residual of the products, Σ_k p_k B_k A_k − B̄ Ā, is folded into the base. It is sent
as factors of rank S·r instead of a dense matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, algorithms, groups, in_order
from fedmllm.algorithms.factors import fold_of, folded, lora_state, rank_of, residual
from fedmllm.algorithms.fedavg import Weighting, mean_adapter, weights_of
from fedmllm.tensors import State


@algorithms.register("fedex-lora")
def fedex_lora(*, weighting: Weighting = "examples") -> Algorithm:
    """Average A and B, and fold the residual of the products into the base (2410.09432)."""

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        ordered, mean = in_order(updates), mean_adapter(updates, weighting)
        scale = info.adapter.scale(rank_of(mean))
        change = {
            m: (left * scale, right) for m, (left, right) in residual(ordered, weights_of(ordered, weighting), mean).items()
        }
        return {**state, "adapter": mean, "fold": folded(fold_of(state), change)}

    return Algorithm(lora_state, aggregate, message=groups("adapter", "fold"), needs_lora=True)
