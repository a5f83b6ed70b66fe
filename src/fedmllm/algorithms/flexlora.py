"""FlexLoRA: Bai et al. 2024, "Federated Fine-tuning of LLMs under Heterogeneous Tasks and Client Resources" (2402.11505).

s B A ← SVD_r(Σ_k p_k s_k B_k A_k): the mean of the products, truncated to the server's rank; each client is sent the
truncation to its own rank. The paper multiplies B by √Σ or by Σ without giving a reason; here B has Σ (see `best_factors`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update, algorithms, groups, in_order
from fedmllm.algorithms.factors import A, B, best_factors, lora_state, rank_of, resized, stacked
from fedmllm.algorithms.fedavg import Weighting, weights_of
from fedmllm.tensors import State, Tensors


def to_own_rank(state: State, client: int, info: RoundInfo) -> State:
    """The adapter at the rank of the client."""
    adapter = state["adapter"]
    return {"adapter": resized(adapter, info.ranks.get(client, rank_of(adapter)), info.adapter)}


def own_rank_and_fold(state: State, client: int, info: RoundInfo) -> State:
    """The adapter at the rank of the client, and the fold if there is one yet."""
    return {**to_own_rank(state, client, info), **groups("fold")(state, client, info)}


def truncated(state: Tensors, module: str, left: torch.Tensor, right: torch.Tensor) -> Tensors:
    """The best factors of left·right at the server's rank. If the product has a lower rank, the other rows of A keep the
    server's values."""
    old_a, old_b = state[module + A], state[module + B]
    b, a = best_factors(left, right, old_a.shape[0])
    b = pad(b, (0, old_b.shape[1] - b.shape[1])).to(old_b.dtype)
    return {module + A: torch.cat((a.to(old_a.dtype), old_a[a.shape[0] :])), module + B: b}


@algorithms.register("flexlora")
def flexlora(*, weighting: Weighting = "examples") -> Algorithm:
    """Average the products B A and factorise them again by SVD; ranks may differ (2402.11505)."""

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        ordered, adapter = in_order(updates), state["adapter"]
        scale = info.adapter.scale(rank_of(adapter))
        new: Tensors = {}
        for module, (left, right) in stacked(ordered, weights_of(ordered, weighting), info.adapter).items():
            new |= truncated(adapter, module, left / scale, right)
        return {**state, "adapter": new}

    return Algorithm(
        lora_state, aggregate, message=to_own_rank, uploads=to_own_rank, needs_lora=True, unequal_ranks=True, refactors=True
    )
