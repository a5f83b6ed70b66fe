"""paired-few: clients of one modality, and a few that see both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmllm.data.scenarios import BOTH, IMAGE, TEXT, Modalities, Scenario, Shares, count_or_share, scenarios


@scenarios.register("paired-few")
def paired_few(*, paired: int | float = 1, image_clients: int | float = 0.5) -> Scenario:
    """Clients with one modality, and `paired` clients with both; `image_clients` of the others have images.

    Each option is a count, or a share if it is written with a decimal point: of all clients for `paired`, of those with one
    modality for `image_clients`. With `paired = 0`, this is `cross`.
    """
    count_paired, count_images = count_or_share("paired", paired), count_or_share("image_clients", image_clients)

    def counts(number: int) -> tuple[int, int]:
        both = count_paired(number)
        return both, count_images(number - both)

    def clients(number: int, rng: np.random.Generator) -> Sequence[Modalities]:
        both, images = counts(number)
        order = rng.permutation(number).tolist()
        # Images first, so that `paired = 0` draws what `cross` draws.
        has = [IMAGE] * images + [TEXT] * (number - both - images) + [BOTH] * both
        return [modalities for _, modalities in sorted(zip(order, has, strict=True), key=lambda pair: pair[0])]

    def expected(kind: Modalities, number: int) -> Shares:
        both, images = counts(number)
        shares = {BOTH: both / number, IMAGE: images / number, TEXT: (number - both - images) / number}
        return shares if kind == BOTH else {kind: 1.0}

    return Scenario(clients, expected=expected)
