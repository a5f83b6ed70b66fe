"""FediLoRA: Yang et al. 2025, "Heterogeneous LoRA for Federated Multimodal Fine-tuning under Missing Modalities" (2509.06984).

Server: each row of A and column of B is averaged over the clients whose rank includes it, with p_k normalised over those
clients, so that low ranks do not dilute the high rows with zeros. A row of no sampled client keeps its value.

Client: after training, a client that lacks modalities finds the A with the lowest cosine similarity c to the received one and
repairs it: A ← c A + (1 − c) A_received, with c clamped to [0, 1]. The first round is left out, as nothing was learnt before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cosine_similarity

from fedmllm.algorithms.base import Algorithm, LocalResult, RoundInfo, Update, algorithms, in_order
from fedmllm.algorithms.factors import A, B, lora_state, modules, rank_of, resized
from fedmllm.algorithms.fedavg import Weighting, weights_of
from fedmllm.algorithms.flexlora import to_own_rank
from fedmllm.tensors import State, Tensors, clone


def repaired(trained: Tensors, received: Tensors) -> Tensors:
    """`trained`, with the A that is least similar to the received one moved towards it."""
    similarity = {
        m: float(cosine_similarity(trained[m + A].double().flatten(), received[m + A].double().flatten(), dim=0))
        for m in modules(trained)
    }
    worst = min(similarity, key=lambda m: similarity[m])
    c = min(max(similarity[worst], 0.0), 1.0)
    return {**clone(trained), worst + A: c * trained[worst + A] + (1 - c) * received[worst + A]}


@algorithms.register("fedilora")
def fedilora(*, repair: bool = True, weighting: Weighting = "examples") -> Algorithm:
    """Average each rank's row over the clients that have it; clients without a modality repair a layer (2509.06984)."""

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        ordered, adapter = in_order(updates), state["adapter"]
        rank = rank_of(adapter)
        weights = torch.tensor(weights_of(ordered, weighting), dtype=torch.float64)
        has = torch.tensor([[row < rank_of(u.groups["adapter"]) for row in range(rank)] for u in ordered])
        share = weights[:, None] * has  # (clients, rank)
        reached = share.sum(0) > 0
        share = share / share.sum(0).where(reached, torch.ones(()).double())
        padded = [resized(u.groups["adapter"], rank, info.adapter) for u in ordered]
        new: Tensors = {}
        for m in modules(adapter):
            a = sum((s[:, None] * p[m + A].double() for s, p in zip(share, padded, strict=True)), torch.zeros(()).double())
            b = sum((s[None, :] * p[m + B].double() for s, p in zip(share, padded, strict=True)), torch.zeros(()).double())
            new[m + A] = a.float().where(reached[:, None], adapter[m + A])
            new[m + B] = b.float().where(reached[None, :], adapter[m + B])
        return {**state, "adapter": new}

    def finish(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        repairs = repair and info.round > 0 and info.me.gap > 0
        return {"adapter": repaired(result.trained, result.received) if repairs else clone(result.trained)}, {}

    return Algorithm(
        lora_state, aggregate, finish=finish, message=to_own_rank, uploads=to_own_rank, needs_lora=True, unequal_ranks=True
    )
