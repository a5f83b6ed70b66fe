"""Many clients on several GPUs or machines, over Ray. What runs there and here is in `fedmllm.remote`; this file knows the
options."""

from __future__ import annotations

from fedmllm.errors import ConfigError
from fedmllm.federation import Fleet
from fedmllm.fleets import fleets
from fedmllm.fleets.base import FleetKind, Site


def _nowhere(site: Site) -> Fleet:
    raise ConfigError('fleet.name = "ray" needs its actors; start the run with `fedmllm run`, or in `remote.actors.on_ray`.')


@fleets.register("ray")
def ray(
    address: str | None = None,
    actors: int | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    timeout: float = 3600.0,
) -> FleetKind:
    """Clients in actors that each hold the model, one to a GPU or to a share of the cores, on one machine or many.

    `address` is an existing cluster's, "auto" for the one that this machine belongs to; without it, this machine alone.
    `actors` is how many there are, by default one a GPU, or one to four cores where there is none; `cpus` and `gpus` are what
    each gets. `timeout` is how many seconds a round may take.
    """
    if timeout <= 0:
        raise ValueError("timeout: must be more than 0 seconds")
    if actors is not None and actors < 1:
        raise ValueError("actors: must be at least 1")
    if (cpus is not None and cpus <= 0) or (gpus is not None and gpus < 0):
        raise ValueError("cpus must be more than 0, gpus not less")
    return FleetKind(_nowhere, here=False)
