"""Modality-aware aggregation: each block of the adapter is averaged over the clients that have samples of its modality.

    w_b ← w_b + η_g Σ_k p_kb (w_kb − w_b),   p_kb ∝ n_k s_km for a block b of modality m,   p_kb ∝ n_k for the other blocks

n_k are the client's samples and s_km the share of them that shows m. A block of which no client of the round has a sample keeps
its value. If all samples show everything, this is FedAvg.

BLOSSOM (M R et al. 2026, 2603.27552) averages the encoder of a modality over the clients that own it, by the number of their
samples; here a client counts by those of its samples that show the modality, because a sample without a picture does not train
the vision tower. The blocks are the factors A and B of every layer. What BLOSSOM can keep private is shared here.

Each client sends its shares. A share is at most 1, so in no block does a client weigh more than its samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmllm.algorithms.base import (
    Algorithm,
    LocalResult,
    RoundInfo,
    Update,
    algorithms,
    groups,
    in_order,
    positive,
    send_adapter,
)
from fedmllm.tensors import State, Tensors, add, clone, scale, subtract, weighted_mean


def _modalities(info: RoundInfo) -> list[str]:
    """The modalities that have blocks of their own."""
    return sorted(set(info.adapter.modality.values()))


def _refuse(update: Update, state: State, info: RoundInfo) -> str | None:
    wrong = [m for m in _modalities(info) if not 0 <= float(update.groups["shows"][m]) <= 1]
    return f"the part of its samples that shows {wrong[0]!r} is not between 0 and 1" if wrong else None


@algorithms.register("modality-aware")
def modality_aware(*, server_lr: float = 1.0) -> Algorithm:
    """Average what only pictures pass through over the clients that have pictures, weighted by how many (2603.27552)."""
    positive(server_lr=server_lr)

    def finish(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        upload = send_adapter(result, received, memory, info)[0]
        shows = {m: torch.tensor([info.me.shows.get(m, 0.0)]) for m in _modalities(info)}
        return {**upload, **({"shows": shows} if shows else {})}, {}

    def uploads(state: State, client: int, info: RoundInfo) -> State:
        shows = {m: torch.zeros(1) for m in _modalities(info)}
        return {**groups("adapter")(state, client, info), **({"shows": shows} if shows else {})}

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        ordered, adapter = in_order(updates), state["adapter"]
        blocks: dict[str, list[str]] = {}
        for name in adapter:
            blocks.setdefault(info.adapter.modality.get(name, ""), []).append(name)
        target: Tensors = dict(adapter)
        for modality, names in blocks.items():
            weights = [u.examples * (float(u.groups["shows"][modality]) if modality else 1.0) for u in ordered]
            if any(weights):
                target |= weighted_mean([{name: u.groups["adapter"][name] for name in names} for u in ordered], weights)
        return {**state, "adapter": add(adapter, scale(subtract(target, adapter), server_lr))}

    return Algorithm(
        init=lambda adapter: {"adapter": clone(adapter)},
        aggregate=aggregate,
        finish=finish,
        uploads=uploads,
        refuse=_refuse,
        needs_modalities=True,
    )
