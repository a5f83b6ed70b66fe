"""FLoRA: Wang et al. 2024, "Federated Fine-Tuning LLMs with Heterogeneous Low-Rank Adaptations" (2409.05976).

Updates are stacked instead of averaged: with left = [s_1 B_1 … s_S B_S] and right = [p_1 A_1; …; p_S A_S], left·right is
Σ_k p_k s_k B_k A_k exactly, whatever the ranks. It is folded into the base, and a new adapter starts with A random and B = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, algorithms, in_order
from fedmllm.algorithms.factors import fold_of, folded, lora_state, new_lora, stacked
from fedmllm.algorithms.fedavg import Weighting, weights_of
from fedmllm.algorithms.flexlora import own_rank_and_fold, to_own_rank
from fedmllm.tensors import State


@algorithms.register("flora")
def flora(*, weighting: Weighting = "examples") -> Algorithm:
    """Fold the clients' stacked factors into the base and start a new adapter; ranks may differ (2409.05976)."""

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        ordered = in_order(updates)
        fold = folded(fold_of(state), stacked(ordered, weights_of(ordered, weighting), info.adapter))
        return {**state, "adapter": new_lora(state["adapter"], info.seed, "flora", info.round), "fold": fold}

    return Algorithm(
        lora_state,
        aggregate,
        message=own_rank_and_fold,
        uploads=to_own_rank,
        needs_lora=True,
        unequal_ranks=True,
        refactors=True,
    )
