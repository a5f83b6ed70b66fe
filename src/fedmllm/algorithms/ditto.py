"""Ditto: Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization" (2012.04221), Algorithm 1.

    global     FedAvg, as if there were nothing else
    personal   v_k ← v_k − η (∇F_k(v_k) + λ (v_k − w)), with w as received, over the same steps as the global adapter

v_k stays with its client and is what the client is tested with. At λ = 0 the client learns alone; the larger λ, the closer is
v_k to w. The paper leaves the start of v_k open: here it is the adapter that the client receives first, and a client that never
took part is tested with the global one. Under plain SGD, steps with η λ > 2 diverge.

The gradient of a proximal term that pulls to another point than the start, λ (v − w), is λ (v − v_start) + λ (v_start − w): a
proximal strength and an offset.
"""

from __future__ import annotations

from dataclasses import replace

from fedmllm.algorithms.base import (
    Algorithm,
    LocalResult,
    LocalRule,
    OwnTraining,
    RoundInfo,
    algorithms,
    not_negative,
    send_adapter,
)
from fedmllm.algorithms.fedavg import Weighting, fedavg
from fedmllm.tensors import State, clone, scale, subtract


def remember_own(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
    """Upload the trained adapter, and remember the client's own one, of this round or of an earlier one."""
    upload, _ = send_adapter(result, received, memory, info)
    own = memory.get("own") if result.own is None else clone(result.own)
    return upload, {"own": own} if own else {}


@algorithms.register("ditto")
def ditto(*, lam: float = 1.0, server_lr: float = 1.0, weighting: Weighting = "examples") -> Algorithm:
    """FedAvg, and beside it an adapter of each client's own that is tied to the global one with strength lam (2012.04221)."""
    not_negative(lam=lam)

    def own(received: State, memory: State, info: RoundInfo) -> OwnTraining:
        w = received["adapter"]
        start = memory.get("own", w)
        return OwnTraining(start, LocalRule(proximal=dict.fromkeys(w, lam), offset=scale(subtract(start, w), lam)))

    return replace(fedavg(server_lr=server_lr, weighting=weighting), finish=remember_own, own=own, personal=True)
