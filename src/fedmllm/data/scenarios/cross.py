"""cross: every client has one modality (FedMLLM, arXiv 2411.14717, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmllm.data.scenarios import BOTH, IMAGE, TEXT, Modalities, Scenario, Shares, count_or_share, scenarios


@scenarios.register("cross")
def cross(*, image_clients: int | float = 0.5) -> Scenario:
    """Image-only and text-only clients; `image_clients` is a count, or a share if it is written with a decimal point.

    The paper's ratios 3:7, 5:5 and 7:3 among 10 clients are 3, 5 and 7, or 0.3, 0.5 and 0.7.
    """
    count = count_or_share("image_clients", image_clients)

    def clients(number: int, rng: np.random.Generator) -> Sequence[Modalities]:
        chosen = set(rng.permutation(number)[: count(number)].tolist())
        return [IMAGE if client in chosen else TEXT for client in range(number)]

    def expected(kind: Modalities, number: int) -> Shares:
        share = count(number) / number
        return {IMAGE: share, TEXT: 1 - share} if kind == BOTH else {kind: 1.0}

    return Scenario(clients, expected=expected)
