"""The table `[fleet]` of the experiment file, with one dataclass of options per fleet."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.registry import Registry


@dataclass(frozen=True)
class FleetOptions:
    """The options of any fleet."""


_LONGEST = 10_000_000  # four months; the operating system's own waits overflow at some larger number
fleets: Registry[FleetOptions] = Registry("fleet", __name__)


@fleets.register("in-process")
@dataclass(frozen=True, kw_only=True)
class InProcessOptions(FleetOptions):
    """All clients in this process on one resident model, `train.cohort` of them in one pass."""


@fleets.register("ray")
@dataclass(frozen=True, kw_only=True)
class RayOptions(FleetOptions):
    """Clients in Ray actors that each hold the model, one per GPU or per share of the cores, on one machine or many.

    `address` is the address of an existing cluster, or "auto" for the cluster to which this machine belongs; without it, Ray is
    started on this machine only. `actors` is the number of actors, by default one per GPU, or one per four cores without a GPU.
    `cpus` and `gpus` are the resources of each actor. `timeout` is the longest duration of a round, in seconds.
    """

    address: str | None = None
    actors: int | None = None
    cpus: float | None = None
    gpus: float | None = None
    timeout: float = 3600.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= _LONGEST:
            raise ValueError(f"timeout: must be greater than 0 and at most {_LONGEST} seconds")
        if self.actors is not None and self.actors < 1:
            raise ValueError("actors: must be at least 1")
        if (self.cpus is not None and self.cpus <= 0) or (self.gpus is not None and self.gpus < 0):
            raise ValueError("cpus must be greater than 0, and gpus at least 0")


@fleets.register("flower")
@dataclass(frozen=True, kw_only=True)
class FlowerOptions(FleetOptions):
    """Clients on other machines, over Flower.

    `sites` names the sites that have data of their own, in the order of the clients; without it, every client reads the
    experiment's task and trains on its part of it. `wait` is how long the server waits for clients before the first round,
    `timeout` how long a round may take, and `absent` how long a client may be unreachable before its round continues without
    it, all in seconds. With `evaluate`, each site also tests the final model on its own test data and sends the metrics.
    """

    sites: list[str] | None = None
    wait: float = 600.0
    timeout: float = 3600.0
    absent: float = 180.0
    evaluate: bool = False

    def __post_init__(self) -> None:
        if self.sites is not None and (not self.sites or len(set(self.sites)) != len(self.sites)):
            raise ValueError("sites: name at least one site, and each only once")
        if not all(0 < seconds <= _LONGEST for seconds in (self.wait, self.timeout, self.absent)):
            raise ValueError(f"wait, timeout and absent: must be greater than 0 and at most {_LONGEST} seconds")
