"""What an algorithm sends and what its clients remember, observed in rounds of toy clients."""

from __future__ import annotations

from fedmllm.algorithms.base import Algorithm
from fedmllm.algorithms.factors import is_a, is_b
from fedmllm.algorithms.toy_federation import CLIENTS, lora_adapter, round_info, run_rounds, train_round
from fedmllm.tensors import State


def _groups_in(state: State) -> set[str]:
    """The names of the groups. A group that holds only one of the LoRA factors has the factor's letter after its name."""
    names = set()
    for group, tensors in state.items():
        factors = {"A" if is_a(name) else "B" for name in tensors if is_a(name) or is_b(name)}
        names.add(f"{group} ({factors.pop()})" if len(factors) == 1 else group)
    return names


def traffic_of(algorithm: Algorithm) -> dict[str, list[str]]:
    """{"down": …, "up": …}: the groups of tensors that are sent in any round, such as "adapter", or "adapter (B)" if only the
    factors B are sent."""
    down: set[str] = set()
    up: set[str] = set()
    for state, updates, _, info in run_rounds(algorithm, rounds=3):
        for update in updates:
            down |= _groups_in(algorithm.message(state, update.client, info))
            up |= _groups_in(update.groups)
    return {"down": sorted(down), "up": sorted(up)}


def keeps_memory(algorithm: Algorithm) -> bool:
    """Whether clients remember anything after the second round; what begins there has begun."""
    memories: dict[int, State] = {}
    train_round(algorithm, algorithm.init(lora_adapter()), memories, round_info(1, CLIENTS))
    return any(tensors for memory in memories.values() for tensors in memory.values())
