"""aligned: heterogeneity in the labels only, which is the partition's affair."""

from __future__ import annotations

from fedmllm.data.scenarios import BOTH, Scenario, scenarios


@scenarios.register("aligned")
def aligned() -> Scenario:
    """Every client sees every modality that a sample has."""
    return Scenario(clients=lambda number, rng: [BOTH] * number)
