"""FedDyn: Acar et al. 2021, "Federated Learning Based on Dynamic Regularization" (2111.04263), Algorithm 1.

    client   g ← g + a (w_local − w) − h_k;   h_k⁺ = h_k − a (w_k − w)
    server   h ← h − a (1/K) Σ_{k sampled} (w_k − w),   w ← mean of the w_k − h / a

The means are unweighted: the method minimises the unweighted mean of the clients' objectives, and h and w must use the same
mean. h / a does not depend on a, so as a → 0 the server's step does not approach FedAvg's; only the local rule becomes plain.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmllm.algorithms.base import Algorithm, LocalResult, LocalRule, RoundInfo, Update, algorithms, positive, send_adapter
from fedmllm.algorithms.fedavg import mean_adapter, mean_change
from fedmllm.tensors import State, Tensors, clone, scale, subtract, zeros_like


@algorithms.register("feddyn")
def feddyn(*, a: float = 0.01) -> Algorithm:
    """Regularise each client dynamically so that local optima agree with the global one (2111.04263)."""
    positive(a=a)

    def init(adapter: Tensors) -> State:
        return {"adapter": clone(adapter), "h": zeros_like(adapter)}

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        change = mean_change(state, updates, "uniform")
        h = subtract(state["h"], scale(change, a * len(updates) / info.clients))
        return {**state, "adapter": subtract(mean_adapter(updates, "uniform"), scale(h, 1 / a)), "h": h}

    def rule(received: State, memory: State, info: RoundInfo) -> LocalRule:
        offset = scale(memory["h"], -1.0) if "h" in memory else None
        return LocalRule(proximal=dict.fromkeys(received["adapter"], a), offset=offset)

    def finish(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        before = memory.get("h", zeros_like(result.received))
        h = subtract(before, scale(subtract(result.trained, result.received), a))
        return send_adapter(result, received, memory, info)[0], {"h": h}

    return Algorithm(init, aggregate, rule, finish, averages="uniform")
