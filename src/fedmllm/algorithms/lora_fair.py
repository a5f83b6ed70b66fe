"""LoRA-FAIR: Bian et al. 2025, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement"
(2411.14961).

Ā and B̄ are computed as in FedIT, and B̄ is corrected so that the product comes closer to the mean of the products, T:

    B ← B̄ + ΔB,   ΔB = argmin ‖T − (B̄ + ΔB) Ā‖² + λ ‖ΔB‖² = (T − B̄ Ā) Āᵀ (Ā Āᵀ + λ I)⁻¹

Clients start from Ā and the corrected B; nothing else travels. The paper minimises a cosine dissimilarity by SGD; the squared
error has this closed form in (r, r) products. λ is `ridge` times the mean squared norm of a row of Ā, so that it has no unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, algorithms, in_order, not_negative
from fedmllm.algorithms.factors import A, B, lora_state, residual
from fedmllm.algorithms.fedavg import Weighting, mean_adapter, weights_of
from fedmllm.tensors import State


@algorithms.register("lora-fair")
def lora_fair(*, ridge: float = 0.01, weighting: Weighting = "examples") -> Algorithm:
    """Average A and B, and correct B so that the product is closer to the mean of the products (2411.14961)."""
    not_negative(ridge=ridge)

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        ordered, mean = in_order(updates), mean_adapter(updates, weighting)
        new = dict(mean)
        for m, (left, right) in residual(ordered, weights_of(ordered, weighting), mean).items():
            a = mean[m + A].double()
            gram = a @ a.T
            damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            # The pseudoinverse, because rows of Ā may be zero or equal.
            correction = left @ (right @ a.T) @ torch.linalg.pinv(damped, hermitian=True)
            new[m + B] = (mean[m + B].double() + correction).to(mean[m + B].dtype)
        return {**state, "adapter": new}

    return Algorithm(lora_state, aggregate, needs_lora=True)
