"""The table `[secure]` of the experiment file. No cryptography is imported here, so that it need not be installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fedmllm.registry import Registry
from fedmllm.rng import stream

Phase = Literal["keys", "shares", "masked", "unmask"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""The questions of a round, in their order."""

secures: Registry[Pairwise | None] = Registry("secure", __name__)


@dataclass(frozen=True)
class Pairwise:
    """The options of secure.name = "pairwise", and what follows from them for a round."""

    threshold: float
    neighbours: int
    clip: float
    bits: int
    max_examples: int

    def peers(self, sampled: Sequence[int], seed: int, round: int) -> Mapping[int, tuple[int, ...]]:
        """For each client those it shares masks with, in the order of their numbers.

        All others, or the nearest on a ring whose order is drawn anew each round: every client draws the same, so the server
        has no say in who stands beside whom.
        """
        clients, reach = sorted(sampled), self.neighbours // 2
        if not reach or 2 * reach >= len(clients) - 1:
            return {client: tuple(other for other in clients if other != client) for client in clients}
        ring = [clients[int(i)] for i in stream(seed, "secure ring", round).permutation(len(clients))]
        steps = [step for step in range(-reach, reach + 1) if step]
        return {client: tuple(sorted(ring[(place + step) % len(ring)] for step in steps)) for place, client in enumerate(ring)}

    def enough(self, holders: int) -> int:
        """How many of the `holders` of a secret's shares it takes to put it together: always more than half."""
        return min(holders, int(self.threshold * holders) + 1)


@secures.register("none")
def no_secure() -> None:
    """Updates travel as they are, and the server sees each one."""


@secures.register("pairwise")
def pairwise(
    *,
    threshold: float = 0.5,
    neighbours: int = 32,
    clip: float = 4.0,
    bits: Literal[16, 32, 64] = 32,
    max_examples: int = 10_000,
) -> Pairwise:
    """The server sees only sums: updates are masked in pairs, and drop-outs are made up for (Bonawitz et al. 2017).

    More than the share `threshold` of the clients must stay to the end of a round. Each shares masks with `neighbours` others;
    0 for all. A number of an update is kept within ±`clip` and becomes an integer of `bits` bits; no client may weigh more than
    `max_examples` samples, and what a sum loses to rounding grows with this.
    """
    if not 0.5 <= threshold < 1:
        raise ValueError(
            f"threshold = {threshold} must be at least 0.5 and below 1: half of the clients must not suffice to unmask one"
        )
    if neighbours < 0 or neighbours % 2 or neighbours == 2:
        raise ValueError(f"neighbours = {neighbours} must be 0, for all, or an even number from 4")
    if clip <= 0:
        raise ValueError(f"clip = {clip} must be above 0")
    if not 1 <= max_examples <= 1 << 20:
        raise ValueError(f"max_examples = {max_examples} must be at least 1 and at most {1 << 20}")
    return Pairwise(threshold, neighbours, clip, bits, max_examples)


__all__ = ["PHASES", "Pairwise", "Phase", "secures"]
