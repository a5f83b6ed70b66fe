"""FedDPA: Yang et al. 2024, "Dual-Personalizing Adapter for Federated Foundation Models" (2403.19211), iterative (FedDPA-T).

A client has two LoRA adapters, a global one and a local one of its own. With both, a layer computes

    W x + a s B_k A_k x + (1 − a) s B A x

From the second round on, a client first trains its local adapter in this sum, the global one as received and fixed, and then
the global one alone, as in FedAvg. Only the global adapter travels. At a = 1 the client learns alone.

A local adapter starts as LoRA does, with A random and B = 0. A client without one is tested with the global adapter.

In the paper the weights of a test sample follow from how similar it is to samples of the client's own, α = ½ mean cosine of
their last hidden states; here a and 1 − a hold for all, as in the published code unless it is told otherwise. The other
variant, in which local adapters are trained after the global one (FedDPA-F), is left out.
"""

from __future__ import annotations

from dataclasses import replace

from fedmllm.algorithms.base import Algorithm, OwnTraining, RoundInfo, algorithms
from fedmllm.algorithms.ditto import remember_own
from fedmllm.algorithms.factors import as_fold, is_b, lora_state, new_lora
from fedmllm.algorithms.fedavg import Weighting, fedavg
from fedmllm.tensors import State, Tensors


@algorithms.register("feddpa")
def feddpa(*, share: float = 0.5, weighting: Weighting = "uniform") -> Algorithm:
    """FedAvg, and an adapter of each client's own that counts by `share` beside the global one (2403.19211)."""
    if not 0 < share <= 1:
        raise ValueError(f"share = {share} must be above 0 and at most 1")

    def own(received: State, memory: State, info: RoundInfo) -> OwnTraining | None:
        if info.round == 0:  # nothing global is learnt yet that it could be trained beside
            return None
        start = memory.get("own") or new_lora(received["adapter"], info.seed, "feddpa", info.me.client)
        return OwnTraining(start, share=share, beside=received["adapter"])

    def tested(message: State, own: Tensors, info: RoundInfo) -> State:
        weighed = {name: tensor * share if is_b(name) else tensor for name, tensor in own.items()}
        return {"adapter": weighed, "fold": as_fold(message["adapter"], 1 - share, info.adapter)}

    plain = fedavg(weighting=weighting)
    return replace(plain, init=lora_state, finish=remember_own, own=own, tested=tested, needs_lora=True, personal=True)
