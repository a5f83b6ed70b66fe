"""What traffic_of under an algorithm, found out by watching it for two rounds on a small made-up adapter."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedmllm.algorithms.base import Algorithm, ClientInfo, LocalResult, RoundInfo, Update, complete
from fedmllm.algorithms.factors import A, B, is_a, is_b
from fedmllm.tensors import State, Tensors

_CLIENTS = (0, 1)


def _toy() -> Tensors:
    return {"layers.0.q_proj" + A: torch.eye(2, 5), "layers.0.q_proj" + B: torch.zeros(5, 2)}


def _what(state: State) -> set[str]:
    """The groups, those that hold one half of the LoRA factors alone with its letter."""
    found = set()
    for group, tensors in state.items():
        halves = {"A" if is_a(name) else "B" for name in tensors if is_a(name) or is_b(name)}
        found.add(f"{group} ({halves.pop()})" if len(halves) == 1 else group)
    return found


def _told(by_round: Iterable[set[str]]) -> list[str]:
    return sorted(set().union(*by_round))


def traffic_of(algorithm: Algorithm) -> dict[str, list[str]]:
    """{"down": …, "up": …}: the groups of tensors that travel in some round; "adapter (B)" where half of it does."""
    initial = _toy()
    state, memories = algorithm.init(initial), dict[int, State]()
    down, up = [], []
    for number in range(3):
        info, updates = RoundInfo(number, 3, 2, _CLIENTS, seed=0), []
        for client in _CLIENTS:
            own = RoundInfo(number, 3, 2, _CLIENTS, seed=0, client=ClientInfo(client, 0.5))
            message = algorithm.message(state, client, info)
            received = complete(message, memories.get(client, {}), initial)
            trained = {name: t + 0.1 * (client + 1) for name, t in received["adapter"].items()}
            gradient = {name: torch.ones_like(t) for name, t in trained.items()}
            result = LocalResult(received["adapter"], trained, gradient, 1, 1, 0.1, {})
            upload, memories[client] = algorithm.finish(result, received, memories.get(client, {}), own)
            updates.append(Update(client, upload, 1, 1))
            down.append(_what(message))
            up.append(_what(upload))
        state = algorithm.aggregate(state, updates, info)
    return {"down": _told(down), "up": _told(up)}
