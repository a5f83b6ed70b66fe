"""FedRot-LoRA: Zhang et al. 2026, "Mitigating Rotational Misalignment in Federated LoRA" (2602.23638).

B A = (B R)(Rᵀ A) for every rotation R, so clients that learnt the same product can hold factors that cancel in a mean. From
round 1 on, each client rotates its trained pair towards the pair that it received, and the server averages as FedAvg does:

    odd rounds   M = A_k A_refᵀ;   even rounds   M = B_kᵀ B_ref
    M = U Σ Vᵀ,   R = U diag(1, …, 1, det(U Vᵀ)) Vᵀ   (the rotation that brings Rᵀ A_k, or B_k R, nearest to the reference)
    R ← the orthogonal factor of (1 − λ) I + λ R,   upload Rᵀ A_k and B_k R

In round 0, B_ref is zero and every client starts from the same A, so nothing is rotated.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedmllm.algorithms.base import Algorithm, LocalResult, RoundInfo, algorithms, send_adapter
from fedmllm.algorithms.factors import A, B, lora_state, modules
from fedmllm.algorithms.fedavg import Weighting, fedavg
from fedmllm.tensors import State, Tensors


def rotation_to(m: Tensor, share: float) -> Tensor:
    """The rotation R: (r, r) that maximises tr(Rᵀ M), moved towards the identity unless `share` is 1. Both are in float64.

    It is the identity if M is zero, which favours no rotation, or not finite, so that the server receives and refuses what
    training made. At `share` = 1/2, a half-turn and the identity cancel, so that their mean has no orthogonal factor; R
    is then made in full.
    """
    identity = torch.eye(len(m), dtype=torch.float64)
    if not bool(m.any()) or not bool(m.isfinite().all()):
        return identity
    u, _, vt = torch.linalg.svd(m)
    turn = identity.clone()
    turn[-1, -1] = torch.sign(torch.linalg.det(u @ vt))
    hard: Tensor = u @ turn @ vt
    u, sigma, vt = torch.linalg.svd((1 - share) * identity + share * hard)
    soft: Tensor = u @ vt
    return soft if float(sigma[-1]) > 1e-6 else hard


def aligned(trained: Tensors, received: Tensors, suffix: str, share: float) -> Tensors:
    """`trained` with each pair rotated so that its factor A or B, as `suffix` says, comes nearer to the received one."""
    new: Tensors = {}
    for module in modules(trained):
        a, b = trained[module + A].double(), trained[module + B].double()
        reference = received[module + suffix].double()
        r = rotation_to(a @ reference.T if suffix == A else b.T @ reference, share)
        new[module + A] = (r.T @ a).to(trained[module + A].dtype)
        new[module + B] = (b @ r).to(trained[module + B].dtype)
    return new


@algorithms.register("fedrot-lora")
def fedrot_lora(*, rotation: float = 0.5, server_lr: float = 1.0, weighting: Weighting = "examples") -> Algorithm:
    """Clients rotate their factors towards the received ones before these are averaged; 0 is FedAvg (2602.23638)."""
    if not 0 <= rotation <= 1:
        raise ValueError(f"rotation = {rotation} must be at least 0 and at most 1")

    def finish(result: LocalResult, received: State, memory: State, info: RoundInfo) -> tuple[State, State]:
        if info.round == 0 or rotation == 0:
            return send_adapter(result, received, memory, info)
        return {"adapter": aligned(result.trained, result.received, A if info.round % 2 else B, rotation)}, {}

    return replace(fedavg(server_lr=server_lr, weighting=weighting), init=lora_state, finish=finish, needs_lora=True)
