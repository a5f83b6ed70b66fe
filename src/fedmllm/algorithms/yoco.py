"""YOCO: Xu et al. 2025, "You Only Communicate Once: One-shot Federated Low-Rank Adaptation of MLLM" (NeurIPS 2025).

One round. The adapter starts from the r largest singular values of each base weight, W₀ ≈ U Σ Vᵀ, B₀ = U √(Σ / s) and
A₀ = √(Σ / s) Vᵀ, and clients add to their loss, for each module and with S = sign(B₀),

    sign · ‖tanh(γ B) − S‖ / (‖S‖ + 10⁻⁶) + sparsity · ‖A‖₁,   γ = γ_max − ½ (γ_max − 1) (1 + cos π t/T)  in step t of T,

so that B keeps directions that all clients share without having communicated, and a client's own features, in A, stay sparse.

The server averages B. Of A it averages the coordinates c_k = V (vec(A_k) − μ) along the first principal components V: (k, n) of
the S vectors vec(A_k), whose plain mean is μ. Averaging is linear, so

    A = μ + Vᵀ Σ p_k c_k = μ + VᵀV (Ā − μ),   Ā = Σ p_k A_k:

k moves A between the plain mean and the weighted one. From k = S − 1 on it is Ā, and with equal weights it is Ā for every k.

The paper has one round. Each further one would do the same from the adapter of the round before, whose signs B then keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fedmllm.algorithms.base import Algorithm, LocalRule, RoundInfo, Update, algorithms, in_order, not_negative
from fedmllm.algorithms.factors import A, B, half, is_a, is_b, lora_state
from fedmllm.algorithms.fedavg import Weighting, fedavg, weights_of
from fedmllm.algorithms.fedopt import fedadagrad, fedyogi
from fedmllm.tensors import State, Tensors, zeros_like

_SERVERS: Mapping[str, Callable[..., Algorithm]] = {"fedavg": fedavg, "fedadagrad": fedadagrad, "fedyogi": fedyogi}


def sign_gradient(b: Tensor, start: Tensor, gamma: float) -> Tensor:
    """The gradient of ‖tanh(γ B) − S‖ / (‖S‖ + 10⁻⁶) with S = sign(`start`); 0 where the norm is 0."""
    signs, soft = start.sign(), (gamma * b).tanh()
    off = soft - signs
    length = off.norm().clamp_min(torch.finfo(off.dtype).tiny)
    return gamma * (1 - soft.square()) * off / (length * (signs.norm() + 1e-6))


def principal_mean(items: Tensor, weights: Tensor, components: int) -> Tensor:
    """The point whose principal coordinates are the mean of the items' own: μ + VᵀV (Σ p_k x_k − μ), for `items` x: (S, n)
    and weights p: (S,) that sum to 1."""
    centre = items.mean(0)
    v = torch.linalg.svd(items - centre, full_matrices=False).Vh[:components]
    return centre + (weights @ items - centre) @ v.T @ v


@algorithms.register("yoco")
def yoco(
    *,
    sign: float = 1.0,
    gamma_max: float = 200.0,
    sparsity: float = 1e-4,
    b_rule: Literal["fedavg", "fedadagrad", "fedyogi"] = "fedavg",
    components: int = 0,
    compensate: bool = True,
    weighting: Weighting = "examples",
) -> Algorithm:
    """One round from the base weights' largest singular values; B keeps their signs, and A stays sparse (NeurIPS 2025)."""
    not_negative(sign=sign, sparsity=sparsity, components=components)
    if not gamma_max >= 1:
        raise ValueError(f"gamma_max = {gamma_max} must be at least 1, where the schedule begins")
    plain, server = fedavg(weighting=weighting), _SERVERS[b_rule](weighting=weighting)
    truncates = components > 0 and weighting == "examples"

    def init(adapter: Tensors) -> State:
        """Zeros until the first round is over, so that the model is the base model."""
        return {"adapter": zeros_like(lora_state(adapter)["adapter"])}

    def message(state: State, client: int, info: RoundInfo) -> State:
        if any(bool(t.any()) for t in state["adapter"].values()):
            return {group: state[group] for group in ("adapter", "fold") if group in state}
        start = info.adapter.principal()
        return start if compensate else {"adapter": start["adapter"]}

    def penalty(w: Tensors, received: Tensors, done: float) -> Tensors:
        gamma = gamma_max - (gamma_max - 1) / 2 * (1 + math.cos(math.pi * done))
        of_b = {n: sign * sign_gradient(b, received[n], gamma) for n, b in w.items() if is_b(n) and sign}
        return of_b | {n: sparsity * a.sign() for n, a in w.items() if is_a(n) and sparsity}

    def rule(received: State, memory: State, info: RoundInfo) -> LocalRule:
        return LocalRule(penalty=penalty if sign or sparsity else None)

    def aggregate(state: State, updates: Sequence[Update], info: RoundInfo) -> State:
        ordered, sent = in_order(updates), message(state, -1, info)
        mean, by_rule = (s.aggregate(s.init(sent["adapter"]), ordered, info)["adapter"] for s in (plain, server))
        new = half(mean, A) | half(by_rule, B)
        if truncates:
            weights = torch.tensor(weights_of(ordered, weighting), dtype=torch.float64)
            for name, a in half(mean, A).items():
                rows = torch.stack([update.groups["adapter"][name].double().flatten() for update in ordered])
                new[name] = principal_mean(rows, weights / weights.sum(), components).view(a.shape).to(a.dtype)
        return {**state, **sent, "adapter": new}

    def uploads(state: State, client: int, info: RoundInfo) -> State:
        return {"adapter": message(state, client, info)["adapter"]}

    # The first round does not start from the initial adapter, so nothing that belongs to it can be carried over.
    return Algorithm(
        init, aggregate, rule, message=message, uploads=uploads, needs_lora=True, refactors=True,
        averages=None if truncates else weighting,
    )  # fmt: skip
