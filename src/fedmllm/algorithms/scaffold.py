"""SCAFFOLD: Karimireddy et al. 2020, "Stochastic Controlled Averaging for Federated Learning" (1910.06378), Algorithm 1.

    client   g ← g + c − c_k;   c_k⁺ = the mean of the raw gradients g over the local steps
    server   w ← w + η_g mean of the (w_k − w),   c ← c + (1/K) Σ_{k sampled} (c_k⁺ − c_k)

Both means are unweighted, as in the paper. Weighting clients by size in the first mean alone does not work: at a point with
Σ p_k g_k = 0, c is not 0, and every client keeps drifting along −c (docs/log.md has the cost).

Under plain SGD this c_k⁺ equals the paper's option II, c_k − c + (w − w_k) / (τ_k η_l), because the steps sum to
η_l Σ (g + c − c_k). Under AdamW, momentum, clipping, weight decay or a proximal term, the gradients cannot be derived from the
path, so they are observed (as in option I, but along the path instead of at w).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedmllm.algorithms.base import (
    Algorithm,
    LocalResult,
    LocalRule,
    RoundInfo,
    Update,
    algorithms,
    groups,
    in_order,
    send_adapter,
)
from fedmllm.algorithms.fedavg import fedavg
from fedmllm.tensors import State, Tensors, subtract, zeros_like


@algorithms.register("scaffold")
def scaffold(*, server_lr: float = 1.0) -> Algorithm:
    """Correct each client's drift with control variates (1910.06378)."""
    plain = fedavg(server_lr=server_lr, weighting="uniform")

    def init(adapter: Tensors) -> State:
        return {**plain.init(adapter), "control": zeros_like(adapter)}

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        control: Tensors = {}
        for name, c in state["control"].items():
            change = sum((u.groups["control"][name].double() for u in in_order(updates)), torch.zeros((), dtype=torch.float64))
            control[name] = (c.double() + change / info.clients).to(c.dtype)
        return {**plain.aggregate(state, updates, info), "control": control}

    def rule(received: State, memory: State, info: RoundInfo) -> LocalRule:
        own = memory.get("control", zeros_like(received["control"]))
        return LocalRule(offset=subtract(received["control"], own), observe_gradient=True)

    def finish(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        if result.mean_gradient is None:
            raise ValueError("SCAFFOLD needs the mean gradient that its rule requests")
        before = memory.get("control", zeros_like(received["control"]))
        upload, _ = send_adapter(result, received, memory, info)
        after = {name: tensor.clone() for name, tensor in result.mean_gradient.items()}
        return {**upload, "control": subtract(after, before)}, {"control": after}

    both = groups("adapter", "control")
    averaged = replace(plain, init=init, aggregate=aggregate, summed=("adapter", "control"))
    return replace(averaged, rule=rule, finish=finish, message=both, uploads=both)
