"""Fed-SB: Singhal et al. 2025, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning" (2502.15436), from the start of LoRA-SB (Ponkshe et al. 2024, 2411.19557).

A weight is W₀ + s B R A, of which clients train and send R alone, and the mean of R is the mean of the models:

    s B R̄ A = Σ_k p_k s B R_k A

Until B and A are known, clients train nothing and send the gradient G_k of their loss with respect to each W₀, as its best
factors of rank r. The server takes the SVD of their mean, and from then on sends

    B = U_r,   A = V_rᵀ   of   Σ_k p_k G_k ≈ U Σ Vᵀ,   and R, which starts at 0

LoRA-SB starts R at what the first step of training would make it; here the first step makes it so (R = −η s Σ_r under SGD).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedmllm.algorithms.base import Algorithm, LocalResult, LocalRule, RoundInfo, Update, algorithms, groups, in_order
from fedmllm.algorithms.factors import BASIS_A, BASIS_B, A, B, best_factors, modules, with_rank
from fedmllm.algorithms.fedavg import Weighting, fedavg, weights_of
from fedmllm.tensors import State, Tensors


def basis_of(gradients: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """The orthonormal B (d_out, r) and A (r, d_in) of the r largest singular values of Σ p_k B_k A_k, by module, for gradients
    given as factors. Directions beyond the rank of that sum are 0."""
    total, basis = sum(weights), {}
    for m in modules(gradients[0]):
        left = torch.cat([g[m + B].double() * (w / total) for g, w in zip(gradients, weights, strict=True)], dim=1)
        right = torch.cat([g[m + A].double() for g in gradients])
        b, a = best_factors(left, right, gradients[0][m + A].shape[0])
        size = b.norm(dim=0)
        is_noise = size <= 1e-12 * size.max()
        b, a = (b / size).masked_fill(is_noise, 0), a.masked_fill(is_noise[:, None], 0)
        pair = with_rank(m, a, b, gradients[0][m + A].shape[0])
        basis |= {m + BASIS_A: pair[m + A].float().contiguous(), m + BASIS_B: pair[m + B].float().contiguous()}
    return basis


@algorithms.register("fed-sb")
def fed_sb(*, weighting: Weighting = "examples") -> Algorithm:
    """Average R of s B R A, with B and A from the gradient that clients send in the first round (2502.15436)."""
    plain = fedavg(weighting=weighting)

    def rule(received: State, memory: State, info: RoundInfo) -> LocalRule:
        return LocalRule() if "fold" in received else LocalRule(lr_factor=0.0, observe_base=True)

    def finish(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        upload, remembered = plain.finish(result, received, memory, info)
        return (upload if result.base_gradient is None else {**upload, "gradient": result.base_gradient}), remembered

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        after = plain.aggregate(state, updates, info)
        if "fold" in state:
            return after
        ordered = in_order(updates)
        return {**after, "fold": basis_of([u.groups["gradient"] for u in ordered], weights_of(ordered, weighting))}

    def uploads(state: State, client: int, info: RoundInfo) -> State:
        adapter = {"adapter": state["adapter"]}
        return adapter if "fold" in state else {**adapter, "gradient": info.adapter.basis()}

    return replace(
        plain,
        aggregate=aggregate,
        rule=rule,
        finish=finish,
        message=groups("adapter", "fold"),
        uploads=uploads,
        summed=("adapter", "gradient"),
        needs_core=True,
        averages=None,
    )
