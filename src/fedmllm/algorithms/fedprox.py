"""FedProx: Li et al. 2020, "Federated Optimization in Heterogeneous Networks" (1812.06127).

Each client minimises its loss plus μ/2 ‖w_local − w‖², whose gradient is μ (w_local − w). It changes local training only,
so it is a wrapper around any algorithm; the name `fedprox` among the algorithms is that wrapper around FedAvg.
"""

from __future__ import annotations

from dataclasses import replace

from fedmllm.algorithms.base import Algorithm, LocalRule, Wrapper, algorithms, changed_rule, regularizations
from fedmllm.algorithms.fedavg import Weighting, fedavg
from fedmllm.tensors import State


def proximal(algorithm: Algorithm, mu: float) -> Algorithm:
    """`algorithm` with μ added to the proximal strength of every tensor it received."""
    if mu < 0:
        raise ValueError(f"mu = {mu} must not be negative")

    def change(rule: LocalRule, received: State) -> LocalRule:
        return replace(rule, proximal={name: rule.proximal.get(name, 0.0) + mu for name in received["adapter"]})

    return changed_rule(algorithm, change)


@regularizations.register("fedprox")
def fedprox_wrapper(*, mu: float = 0.01) -> Wrapper:
    """Tie every trained tensor to its received value with strength mu (1812.06127)."""
    if mu < 0:
        raise ValueError(f"mu = {mu} must not be negative")
    return lambda algorithm: proximal(algorithm, mu)


@algorithms.register("fedprox")
def fedprox(*, mu: float = 0.01, server_lr: float = 1.0, weighting: Weighting = "examples") -> Algorithm:
    """FedAvg whose clients are tied to the received adapter with strength mu (1812.06127)."""
    return proximal(fedavg(server_lr=server_lr, weighting=weighting), mu)
