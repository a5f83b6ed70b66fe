"""Clients at other machines, over Flower. What runs there and here is in `fedmllm.remote`; this file knows the options."""

from __future__ import annotations

from fedmllm.errors import ConfigError
from fedmllm.federation import Fleet
from fedmllm.fleets import fleets
from fedmllm.fleets.base import FleetKind, Site

_REFUSAL = (
    'fleet.name = "flower" has no clients in this process; start it with `fedmllm server`, or with `flwr run` on the app in '
    "examples/flower, or add --set fleet.name=in-process."
)


def _nowhere(site: Site) -> Fleet:
    raise ConfigError(_REFUSAL)


@fleets.register("flower")
def flower(
    sites: list[str] | None = None,
    wait: float = 600.0,
    timeout: float = 3600.0,
    absent: float = 180.0,
    evaluate: bool = False,
) -> FleetKind:
    """Clients at other machines, over Flower.

    `sites` are the names of sites that bring data of their own, client 0 first; without it, all read the experiment's task and
    train on their client's part of it. `wait` is how many seconds the server waits for clients before the first round,
    `timeout` how many a round may take; a round goes on without a client whose machine is gone for `absent` of them.
    With `evaluate`, each site tests the final model on test data of its own too, and sends the figures.
    """
    if sites is not None and (not sites or len(set(sites)) != len(sites)):
        raise ValueError("sites: name at least one, each once")
    if min(wait, timeout, absent) <= 0:
        raise ValueError("wait, timeout and absent: must be more than 0 seconds")
    return FleetKind(_nowhere, here=False, refuse=_REFUSAL)
