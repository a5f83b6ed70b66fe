"""HetLoRA: Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (2401.06432).

Each client's factors are padded with zeros to the server's rank and averaged with weights ∝ ‖s_k B_k A_k‖_F, taken over all
modules together, so that clients that learnt more have more weight; each client is sent the truncation to its own rank. The
paper also prunes a client's rank during training; that is left out, because the experiment file sets the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedmllm.algorithms.base import AdapterInfo, Algorithm, RoundInfo, Update, algorithms, in_order
from fedmllm.algorithms.factors import A, B, lora_state, modules, rank_of, resized
from fedmllm.algorithms.flexlora import to_own_rank
from fedmllm.tensors import State, Tensors, weighted_mean


def product_norm(adapter: Tensors, info: AdapterInfo) -> float:
    """‖s B A‖_F over all modules, computed from (r, r) products: ‖B A‖² = Σ (Bᵀ B) ∘ (A Aᵀ)."""
    total = 0.0
    for m in modules(adapter):
        a, b = adapter[m + A].double(), adapter[m + B].double()
        total += float(((b.T @ b) * (a @ a.T)).sum())
    return info.scale(rank_of(adapter)) * math.sqrt(max(total, 0.0))


@algorithms.register("hetlora")
def hetlora() -> Algorithm:
    """Average factors padded with zeros, weighted by the norm of their product; ranks may differ (2401.06432)."""

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        ordered, rank = in_order(updates), rank_of(state["adapter"])
        weights = [product_norm(u.groups["adapter"], info.adapter) for u in ordered]
        if not any(weights):  # every product is zero
            weights = [1.0] * len(ordered)
        padded = [resized(u.groups["adapter"], rank, info.adapter) for u in ordered]
        return {**state, "adapter": weighted_mean(padded, weights)}

    return Algorithm(lora_state, aggregate, message=to_own_rank, uploads=to_own_rank, needs_lora=True, unequal_ranks=True)
