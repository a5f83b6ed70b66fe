"""The table `[secure]` of the experiment file. Imports no cryptography, whose libraries are optional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fedmllm.registry import Registry
from fedmllm.rng import stream

Phase = Literal["keys", "shares", "masked", "unmask"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""The phases of a round in their order. The names travel as kinds of jobs."""

secures: Registry[Pairwise | None] = Registry("secure", __name__)


@dataclass(frozen=True)
class Pairwise:
    """The options of secure.name = "pairwise", and what a round derives from them."""

    threshold: float
    neighbours: int
    clip: float
    bits: int
    max_examples: int

    def peers(self, sampled: Sequence[int], seed: int, round: int) -> Mapping[int, tuple[int, ...]]:
        """client -> the clients with which it shares masks, in ascending order.

        These are all others, or the nearest ones on a ring that is drawn anew in each round. Every client draws the same ring
        from the experiment's seed, so the server cannot choose a client's neighbours.
        """
        clients, reach = sorted(sampled), self.neighbours // 2
        if not reach or 2 * reach >= len(clients) - 1:
            return {client: tuple(other for other in clients if other != client) for client in clients}
        ring = [clients[int(i)] for i in stream(seed, "secure ring", round).permutation(len(clients))]
        offsets = [offset for offset in range(-reach, reach + 1) if offset]
        return {
            client: tuple(sorted(ring[(position + offset) % len(ring)] for offset in offsets))
            for position, client in enumerate(ring)
        }

    def required(self, holders: int) -> int:
        """How many of a secret's shares are needed to reconstruct it: always more than half of the `holders`."""
        return min(holders, int(self.threshold * holders) + 1)


@secures.register("none")
def no_secure() -> None:
    """Updates are sent unmasked, and the server sees each one."""


@secures.register("pairwise")
def pairwise(
    *,
    threshold: float = 0.5,
    neighbours: int = 32,
    clip: float = 4.0,
    bits: Literal[16, 32, 64] = 32,
    max_examples: int = 10_000,
) -> Pairwise:
    """The server sees only sums: updates are masked in pairs, and drop-outs are tolerated (Bonawitz et al. 2017).

    More than the share `threshold` of the clients must stay to the end of a round. Each client shares masks with `neighbours`
    others, or with all if it is 0. The numbers of an update are clipped to ±`clip` and encoded as integers of `bits` bits. A
    client may weigh at most `max_examples` samples; the rounding error of the sum grows with this value.
    """
    if not 0.5 <= threshold < 1:
        raise ValueError(
            f"threshold = {threshold} must be at least 0.5 and below 1: half of the clients must not be enough to unmask one"
        )
    if neighbours < 0 or neighbours % 2 or neighbours == 2:
        raise ValueError(f"neighbours = {neighbours} must be 0, which means all, or an even number of at least 4")
    if clip <= 0:
        raise ValueError(f"clip = {clip} must be above 0")
    if not 1 <= max_examples <= 1 << 20:
        raise ValueError(f"max_examples = {max_examples} must be at least 1 and at most {1 << 20}")
    return Pairwise(threshold, neighbours, clip, bits, max_examples)
