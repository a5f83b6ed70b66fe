"""FedMomentum: Yan et al. 2026, "Preserving LoRA Training Momentum in Federated Fine-Tuning" (2603.08014).

The mean of the products is factorised: its largest directions become the new adapter, and the next ones go into the base.

    T = Σ_k p_k s_k B_k A_k = U Σ Vᵀ,   s B A ← U_r Σ_r V_rᵀ,   base ← base + U_{r+1:q} Σ_{r+1:q} V_{r+1:q}ᵀ

q is the least number of directions whose Σσ² is the share `energy` of all. B and A have √Σ each. No optimizer's momentum is
involved: the name means that training goes on from what was learnt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, algorithms, in_order
from fedmllm.algorithms.factors import A, B, Factors, best_factors, fold_of, folded, lora_state, rank_of, stacked
from fedmllm.algorithms.fedavg import Weighting, weights_of
from fedmllm.algorithms.flexlora import own_rank_and_fold, to_own_rank
from fedmllm.tensors import State, Tensors

_DEAD = 1e-7
"""A direction whose σ is below this share of the largest is lost in float32."""


@algorithms.register("fedmomentum")
def fedmomentum(*, energy: float = 0.9999, weighting: Weighting = "examples") -> Algorithm:
    """Factorise the mean of the products, and fold what exceeds the rank into the base; ranks may differ (2603.08014)."""
    if not 0 <= energy <= 1:
        raise ValueError(f"energy = {energy} must be at least 0 and at most 1")

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        ordered, adapter = in_order(updates), state["adapter"]
        rank = rank_of(adapter)
        new: Tensors = {}
        residual: Factors = {}
        for m, (left, right) in stacked(ordered, weights_of(ordered, weighting), info.adapter).items():
            b, a = best_factors(left, right, left.shape[1])
            sigma = b.norm(dim=0)
            share = (sigma**2).cumsum(0)
            q = int((share < energy * share[-1]).sum()) + 1
            if q > rank:
                residual[m] = (b[:, rank:q], a[rank:q])
            kept = min(rank, int((sigma > _DEAD * sigma[0]).sum()))
            root = (sigma[:kept] / info.adapter.scale(rank)).sqrt()
            # A direction without weight would have both factors zero and never a gradient again: its A stays as it was.
            new[m + A], new[m + B] = adapter[m + A].clone(), torch.zeros_like(adapter[m + B])
            new[m + A][:kept] = (a[:kept] * root[:, None]).float()
            new[m + B][:, :kept] = (b[:, :kept] * (root / sigma[:kept])).float()
        fold = folded(fold_of(state), residual)
        return {**state, "adapter": new, **({"fold": fold} if fold else {})}

    return Algorithm(
        lora_state,
        aggregate,
        message=own_rank_and_fold,
        uploads=to_own_rank,
        needs_lora=True,
        unequal_ranks=True,
        refactors=True,
    )
