"""trimmed-mean: each entry of the adapter is averaged over S clients, without its ⌊share · S⌋ smallest and largest values.

Yin et al. 2018, "Byzantine-Robust Distributed Learning" (1803.01498).
"""

from collections.abc import Sequence

import torch

from fedmllm.algorithms import Algorithm, RoundInfo, Update, algorithms
from fedmllm.algorithms.base import in_order
from fedmllm.tensors import State, Tensors, clone


@algorithms.register("trimmed-mean")
def trimmed_mean(*, share: float = 0.25) -> Algorithm:
    """Average each entry without its smallest and largest values (1803.01498)."""
    if not 0 <= share < 0.5:
        raise ValueError(f"share = {share} must be at least 0 and below 0.5")

    def init(adapter: Tensors) -> State:
        return {"adapter": clone(adapter)}

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        adapters = [update.groups["adapter"] for update in in_order(updates)]
        cut = int(share * len(adapters))
        new: Tensors = {}
        for name in state["adapter"]:
            ranked = torch.stack([adapter[name] for adapter in adapters]).sort(dim=0).values
            new[name] = ranked[cut : len(adapters) - cut].mean(dim=0)
        return {**state, "adapter": new}

    return Algorithm(init, aggregate)
