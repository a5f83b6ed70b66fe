"""The table `[attack]` of the experiment file: which clients attack, from which round, and what they do.

An attack is simulated: the process that runs the federation changes what the attackers send or what they train on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmllm.algorithms import RoundInfo
from fedmllm.data.samples import Sample
from fedmllm.data.scenarios import Modalities
from fedmllm.registry import Registry
from fedmllm.rng import stream
from fedmllm.tensors import Tensors

Shown = tuple[Sample, Modalities]
"""A training sample, and which of its modalities the client trains on."""
Draw = Callable[[Sample], np.random.Generator]
"""A generator of the sample's own."""
Falsify = Callable[[Sequence[Shown], Draw], list[Shown]]
"""(all samples of an attacker, draw) -> what it trains on instead, in the same order."""
Distort = Callable[[Mapping[int, Tensors], RoundInfo], Mapping[int, Tensors]]
"""(attacker -> the change that it would send in this round, the round) -> what each of them sends instead."""

attacks: Registry[Attack | None] = Registry("attack", "fedmllm.attacks")


@dataclass(frozen=True)
class Attack:
    """`share` of the clients attack in every round from `start` on, counted from 0. One of `falsify` and `distort` is set."""

    share: float
    start: int
    falsify: Falsify | None = None
    distort: Distort | None = None
    colludes: bool = False
    """The attackers combine their changes, which must therefore have equal shapes."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share = {self.share} must be above 0 and below 1")
        if self.start < 0:
            raise ValueError(f"start = {self.start} must not be negative; rounds are counted from 0")

    def attackers(self, clients: int, seed: int) -> frozenset[int]:
        """The attackers among so many clients: `share` of them, rounded to the nearest number (halves up). Those of a smaller
        share are among those of a larger one."""
        count = int(self.share * clients + 0.5)
        return frozenset(int(client) for client in stream(seed, "attackers").permutation(clients)[:count])


@attacks.register("none")
def no_attack() -> None:
    """Every client is honest."""
