"""Attacks on updates: attackers train honestly and send something else.

Δ_k is the change that client k would send: of the adapter since the server sent it, and of every other group that the server
averages. Counts and losses are sent as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist

import torch

from fedmllm.algorithms import RoundInfo
from fedmllm.algorithms.base import positive
from fedmllm.attacks.settings import Attack, attacks
from fedmllm.rng import stream
from fedmllm.tensors import Tensors, norm, scale


def _scaled(by: float, share: float, start: int) -> Attack:
    return Attack(share, start, distort=lambda changes, info: {client: scale(change, by) for client, change in changes.items()})


@attacks.register("sign-flip")
def sign_flip(*, share: float = 0.2, start: int = 0, factor: float = 1.0) -> Attack:
    """Attackers send the opposite of what they learnt: −factor · Δ."""
    positive(factor=factor)
    return _scaled(-factor, share, start)


@attacks.register("scaled")
def scaled(*, share: float = 0.2, start: int = 0, factor: float = 10.0) -> Attack:
    """Attackers exaggerate what they learnt: factor · Δ (1807.00459).

    `train.max_norm_ratio` refuses what is far longer than the updates of the others.
    """
    positive(factor=factor)
    return _scaled(factor, share, start)


@attacks.register("gaussian")
def gaussian(*, share: float = 0.2, start: int = 0, factor: float = 1.0) -> Attack:
    """Attackers send noise: independent N(0, σ²) with σ = factor · the root mean square of Δ, so of the length factor · ‖Δ‖."""
    positive(factor=factor)

    def distort(changes: Mapping[int, Tensors], info: RoundInfo) -> dict[int, Tensors]:
        return {client: noise(client, change, info) for client, change in changes.items()}

    def noise(client: int, change: Tensors, info: RoundInfo) -> Tensors:
        rng = stream(info.seed, "attack noise", client, info.round)
        deviation = factor * norm(change) / math.sqrt(max(1, sum(tensor.numel() for tensor in change.values())))
        drawn = {name: torch.from_numpy(rng.standard_normal(tuple(change[name].shape))) for name in sorted(change)}
        return {name: (drawn[name] * deviation).to(tensor.dtype) for name, tensor in change.items()}

    return Attack(share, start, distort=distort)


def alie_z(clients: int, attackers: int) -> float:
    """How many standard deviations `attackers` of so many `clients` may go: z = Φ⁻¹((n − m − s) / (n − m)), where the
    attackers m need s = ⌊n/2 + 1⌋ − m honest clients beyond them for a majority (1902.06156).

    Beyond the paper: z is at least 0, and s at least 1, for attackers that have a majority already.
    """
    honest = clients - attackers
    needed = max(1, clients // 2 + 1 - attackers)
    return max(0.0, NormalDist().inv_cdf((honest - needed) / honest)) if honest > needed else 0.0


@attacks.register("alie")
def alie(*, share: float = 0.2, start: int = 0, z: float | None = None) -> Attack:
    """A Little Is Enough: colluding attackers all send mean − z · standard deviation of their own honest Δ (1902.06156).

    Both are taken entry by entry over the attackers of the round (σ with division by their number). Without `z`, it follows
    from the numbers of clients and attackers of the round; see `alie_z`.
    """
    if z is not None:
        positive(z=z)

    def distort(changes: Mapping[int, Tensors], info: RoundInfo) -> dict[int, Tensors]:
        deviations = alie_z(len(info.sampled), len(changes)) if z is None else z
        sent: Tensors = {}
        for name, first in next(iter(changes.values())).items():
            values = torch.stack([change[name].double() for _, change in sorted(changes.items())])
            sent[name] = (values.mean(0) - deviations * values.std(0, correction=0)).to(first.dtype)
        return dict.fromkeys(changes, sent)

    return Attack(share, start, distort=distort, colludes=True)
