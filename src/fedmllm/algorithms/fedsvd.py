"""FedSVD: Lee et al. 2025, "Adaptive Orthogonalization for Private Federated Learning with LoRA" (2505.12805).

Clients train B with A fixed, as in FFA-LoRA; the server then factorises the product again:

    B̄ = Σ_k p_k B_k,   U Σ Vᵀ = SVD(B̄ A),   A ← V_rᵀ,   B ← U_r Σ_r

so A adapts to what was learnt, its rows stay orthonormal, and the averaging stays exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, algorithms, groups
from fedmllm.algorithms.factors import A, B, modules
from fedmllm.algorithms.fedavg import Weighting, mean_adapter
from fedmllm.algorithms.flexlora import truncated
from fedmllm.algorithms.one_factor import ffa_lora
from fedmllm.tensors import State, Tensors


@algorithms.register("fedsvd")
def fedsvd(*, weighting: Weighting = "examples") -> Algorithm:
    """Train and average B, then compute a new A from the SVD of the product (2505.12805)."""
    plain = ffa_lora(weighting=weighting)

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        adapter, mean = state["adapter"], mean_adapter(updates, weighting)
        new: Tensors = {}
        for module in modules(adapter):
            new |= truncated(adapter, module, mean[module + B].double(), adapter[module + A].double())
        return {**state, "adapter": new}

    return replace(plain, aggregate=aggregate, message=groups("adapter"), refactors=True)
