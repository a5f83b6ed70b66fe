"""A Ray cluster, and how its resources are divided among actors."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fedmllm.errors import ConfigError
from fedmllm.fleets.options import RayOptions

CORES_PER_ACTOR = 4
"""If there is no GPU."""
LARGEST = "CPU of one machine"
"""The key, in `cluster_resources`, of the cores of the largest machine: an actor that asks for more never starts."""


def cluster_resources() -> dict[str, float]:
    """The total `CPU` and `GPU` of the cluster, and the cores of its largest machine."""
    import ray

    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    total = {kind: sum(float(machine.get(kind, 0.0)) for machine in machines) for kind in ("CPU", "GPU")}
    return total | {LARGEST: max((float(machine.get("CPU", 0.0)) for machine in machines), default=0.0)}


def actor_resources(
    options: RayOptions, available: Mapping[str, float], less: str = "fleet.actors, fleet.cpus or fleet.gpus"
) -> tuple[int, float, float]:
    """(number of actors, cores per actor, GPUs per actor), from the options and what the cluster has (`cluster_resources`).

    Raises ConfigError if the options ask for more than is available; `less` names what to lower.
    """
    cores, devices = available.get("CPU", 0.0), available.get("GPU", 0.0)
    gpus = options.gpus if options.gpus is not None else (1.0 if devices >= 1 else 0.0)
    default = int(devices / gpus) if gpus else max(1, int(cores / (options.cpus or CORES_PER_ACTOR)))
    actors = options.actors or default
    largest = available.get(LARGEST, cores)
    cpus = options.cpus or min(largest, max(1.0, float(int(cores / max(1, actors)))))
    if actors < 1 or actors * cpus > cores or cpus > largest or actors * gpus > devices:
        raise ConfigError(
            f"fleet: {actors} actors of {cpus:g} cores and {gpus:g} GPUs are more than the {cores:g} cores and {devices:g} "
            f"GPUs that Ray has; lower {less}."
        )
    return actors, cpus, gpus


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A connection to the Ray cluster at `address`, or to one that is started on this machine and ends with the context.

    Raises ConfigError if no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    try:
        if address and address != "auto":
            # Fails at once if nothing listens at the address; Ray itself would wait for five minutes.
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        # A new cluster stays on the loopback interface, because Ray requires no password. Without "local", Ray would join any
        # cluster of which it finds traces.
        local = {} if address else {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **local)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f'address = "{address}": no Ray cluster answers ({" ".join(str(error).split())}).') from None
    try:
        yield
    finally:
        ray.shutdown()
