"""aligned: no modality is missing, so clients differ only through the partition."""

from __future__ import annotations

from fedmllm.data.scenarios import BOTH, Scenario, scenarios


@scenarios.register("aligned")
def aligned() -> Scenario:
    """Every client sees every modality of its samples."""
    return Scenario(clients=lambda number, rng: [BOTH] * number, expected=lambda kind, number: {kind: 1.0})
