"""The groups of tensors that an algorithm sends, observed in three rounds of toy clients."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedmllm.algorithms.base import AdapterInfo, Algorithm, RoundInfo
from fedmllm.algorithms.factors import A, B, is_a, is_b
from fedmllm.algorithms.toy_client import LR, train_toy_client
from fedmllm.tensors import State, Tensors

_CLIENTS, _ROUNDS, _LAYERS = (0, 1), 3, 2


def _toy_adapter() -> tuple[Tensors, AdapterInfo]:
    """A LoRA adapter of two layers, of rank 2, d_in = d_out = 5."""
    adapter: Tensors = {}
    for layer in range(_LAYERS):
        module = f"layers.{layer}.q_proj"
        adapter |= {module + A: torch.eye(2, 5), module + B: torch.zeros(5, 2)}
    return adapter, AdapterInfo(_LAYERS, {name: int(name.split(".")[1]) for name in adapter}, alpha=2.0)


def _groups_in(state: State) -> set[str]:
    """The names of the groups. A group that holds only one of the LoRA factors has the factor's letter after its name."""
    names = set()
    for group, tensors in state.items():
        factors = {"A" if is_a(name) else "B" for name in tensors if is_a(name) or is_b(name)}
        names.add(f"{group} ({factors.pop()})" if len(factors) == 1 else group)
    return names


def _union(groups: Iterable[set[str]]) -> list[str]:
    return sorted(set().union(*groups))


def traffic_of(algorithm: Algorithm) -> dict[str, list[str]]:
    """{"down": …, "up": …}: the groups of tensors that are sent in any round, such as "adapter", or "adapter (B)" if only the
    factors B are sent."""
    initial, adapter_info = _toy_adapter()
    state, memories = algorithm.init(initial), dict[int, State]()
    down, up = [], []
    for number in range(_ROUNDS):
        info = RoundInfo(number, _ROUNDS, len(_CLIENTS), _CLIENTS, seed=0, adapter=adapter_info, lr=LR)
        updates = []
        for client in _CLIENTS:
            message = algorithm.message(state, client, info)
            update, memories[client] = train_toy_client(algorithm, client, message, memories.get(client, {}), info, initial)
            updates.append(update)
            down.append(_groups_in(message))
            up.append(_groups_in(update.groups))
        state = algorithm.aggregate(state, updates, info)
    return {"down": _union(down), "up": _union(up)}
