"""FedProx: Li et al. 2020, "Federated Optimization in Heterogeneous Networks" (1812.06127).

Each client minimises its loss plus μ/2 ‖w_local − w‖², whose gradient is μ (w_local − w). Only local training
changes, so FedProx is a wrapper around any algorithm; the algorithm `fedprox` is that wrapper around FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedmllm.algorithms.base import (
    Algorithm,
    LocalRule,
    RoundInfo,
    Wrapper,
    algorithms,
    changed_rule,
    not_negative,
    regularizations,
)
from fedmllm.algorithms.fedavg import Weighting, fedavg
from fedmllm.tensors import State


def tied(rule: LocalRule, strengths: Mapping[str, float]) -> LocalRule:
    """`rule` with these proximal strengths added to its own."""
    return replace(rule, proximal={**rule.proximal, **{n: rule.proximal.get(n, 0.0) + mu for n, mu in strengths.items()}})


def proximal(algorithm: Algorithm, mu: float) -> Algorithm:
    """`algorithm` with μ added to the proximal strength of every received tensor."""
    not_negative(mu=mu)

    def change(rule: LocalRule, received: State, info: RoundInfo) -> LocalRule:
        return tied(rule, dict.fromkeys(received["adapter"], mu))

    return changed_rule(algorithm, change)


@regularizations.register("fedprox")
def fedprox_wrapper(*, mu: float = 0.01) -> Wrapper:
    """Tie every trained tensor to its received value with strength mu (1812.06127)."""
    not_negative(mu=mu)
    return lambda algorithm: proximal(algorithm, mu)


@algorithms.register("fedprox")
def fedprox(*, mu: float = 0.01, server_lr: float = 1.0, weighting: Weighting = "examples") -> Algorithm:
    """FedAvg whose clients are tied to the received adapter with strength mu (1812.06127)."""
    return proximal(fedavg(server_lr=server_lr, weighting=weighting), mu)
