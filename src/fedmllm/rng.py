"""Named random streams: every draw depends only on the experiment's seed and the purpose of the draw.

`stream(seed, "batches", client, round)` gives the same numbers whatever was drawn before and in whatever order clients run or
files are listed. The package never uses a global generator.
"""

from __future__ import annotations

import hashlib

import numpy as np

Name = str | int


def seed_for(seed: int, *names: Name) -> int:
    """A 63-bit integer from `seed` and `names`, stable across processes and machines.

    Example: `torch.manual_seed(seed_for(0, "dropout", client, round))` inside `fork_rng`.
    """
    # The key contains the type, so that the stream of client 1 differs from that of a client named "1".
    key = "\x1f".join(f"{type(name).__name__}:{name}" for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *names: Name) -> np.random.Generator:
    """An independent generator for the purpose given by `names`."""
    return np.random.Generator(np.random.PCG64(seed_for(seed, *names)))
