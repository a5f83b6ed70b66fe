"""The adaptive regularisation of FedMLLM (2411.14717): only the middle layers are tied to the global adapter.

g ← g + μ_k (w_local − w) for tensors of the layers edge ≤ layer ≤ L − 1 − edge; the outer layers, which read the
modalities and write the answer, stay free. L is the number of layers of the model. In a model of fewer than 3 · edge layers,
the `edge` layers in the middle are tied (all if it has fewer; of an odd number of free ones, the end has more), so that a
deeper model never ties fewer: with edge = 4, models of 3, 6, 8, 9, 12, 13 and 28 layers tie 3, 4, 4, 4, 4, 5 and 20. Strengths:

    "fixed"          μ_k = μ · μ_w, as in the published code
    "modality-gap"   μ_k = μ · μ_w · (1 + κ · gap_k), an addition of this project: gap_k is the share of the client's (sample,
                     modality) slots that are empty, so clients that lack more modalities are tied more strongly
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from fedmllm.algorithms.base import Algorithm, LocalRule, RoundInfo, Wrapper, changed_rule, not_negative, regularizations
from fedmllm.algorithms.fedprox import tied
from fedmllm.tensors import State


@lru_cache  # so that the warning is logged once, not for every client and round
def middle(layers: int, edge: int) -> range:
    """The layers that are tied: all but `edge` at each end, and at least `edge`. A warning is logged if fewer are left free."""
    free = min(2 * edge, max(layers - edge, 0))
    if free < 2 * edge:
        logging.getLogger(__name__).warning(
            "adaptive regularisation: edge = %d is too much for %d layers; %d of them are left free", edge, layers, free
        )
    return range(free // 2, layers - (free - free // 2))


@regularizations.register("adaptive")
def adaptive(
    *,
    mu: float = 0.01,
    mu_w: float = 0.1,
    edge: int = 4,
    strength: Literal["fixed", "modality-gap"] = "fixed",
    kappa: float = 1.0,
) -> Wrapper:
    """Tie the middle layers only, optionally more strongly for clients that lack modalities (2411.14717)."""
    not_negative(mu=mu, mu_w=mu_w, edge=edge, kappa=kappa)

    def change(rule: LocalRule, received: State, info: RoundInfo) -> LocalRule:
        mu_k = mu * mu_w * (1 + kappa * info.me.gap if strength == "modality-gap" else 1)
        window = middle(info.adapter.layers, edge)
        names = (name for name in received["adapter"] if info.adapter.layer.get(name) in window)
        return tied(rule, dict.fromkeys(names, mu_k))

    def wrap(algorithm: Algorithm) -> Algorithm:
        return replace(changed_rule(algorithm, change), needs_layers=True)

    return wrap
