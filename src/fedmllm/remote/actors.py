"""Ray: actors that each keep one model and answer the jobs of a cohort at a time; one that dies is replaced.

Jobs and replies are the bytes that travel over Flower too. What clients remember is in the run directory, which all machines
of a cluster must see, if the algorithm remembers anything.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedmllm.config import Experiment
from fedmllm.errors import ConfigError
from fedmllm.federation import Fleet
from fedmllm.fleets.base import FleetKind, Site
from fedmllm.remote.fleet import RemoteFleet
from fedmllm.remote.protocol import Job, Reply, parts_of, to_bytes
from fedmllm.remote.site import Worker

ATTEMPTS = 3
"""How often a cohort is sent out before the death of its actor is taken for the answer."""
CORES_AN_ACTOR = 4
"""Where there is no GPU."""


class _Actor:
    """What lives in an actor's process."""

    def __init__(self, folder: str, home: str, threads: int) -> None:
        import torch

        if Path(home).is_dir():  # relative paths of the experiment mean what they mean where it was started
            os.chdir(home)
        torch.set_num_threads(threads)
        self._worker = Worker(Path(folder))

    def answer(self, jobs: Sequence[bytes]) -> list[bytes]:
        return [to_bytes(reply) for reply in self._worker.answer([Job.of(*parts_of(job)) for job in jobs])]


def split(clients: Sequence[int], actors: int) -> list[list[int]]:
    """The clients in as many runs of almost equal length, none empty. A client that takes part again is likely to find its
    samples encoded: the same clients go the same way."""
    count = min(actors, len(clients))
    bounds = [len(clients) * i // count for i in range(count + 1)] if count else []
    return [list(clients[a:b]) for a, b in pairwise(bounds)]


class ActorPost:
    """`make(number)` starts an actor."""

    def __init__(self, actors: int, make: Callable[[int], Any]) -> None:
        self._make = make
        self._actors = [make(number) for number in range(actors)]

    def exchange(self, jobs: Mapping[int, Job], timeout: float) -> Mapping[int, Reply]:
        """A reply of each client whose actor answers in time; where its actor died too often, one that says so."""
        import ray

        end = time.monotonic() + timeout
        packed = {client: to_bytes(job) for client, job in jobs.items()}
        under_way: dict[Any, tuple[int, list[int], int]] = {}
        replies: dict[int, Reply] = {}

        def send(number: int, clients: list[int], attempt: int) -> None:
            sent = self._actors[number].answer.remote([packed[client] for client in clients])
            under_way[sent] = number, clients, attempt

        for number, clients in enumerate(split(sorted(jobs), len(self._actors))):
            send(number, clients, 1)
        while under_way and (left := end - time.monotonic()) > 0:
            ready, _ = ray.wait(list(under_way), num_returns=1, timeout=left)
            for reference in ready:
                number, clients, attempt = under_way.pop(reference)
                try:
                    answers = [Reply.of(*parts_of(content)) for content in ray.get(reference)]
                    replies |= dict(zip(clients, answers, strict=True))
                except ray.exceptions.RayActorError as error:
                    self._actors[number] = self._make(number)
                    if attempt < ATTEMPTS:
                        send(number, clients, attempt + 1)
                    else:
                        why = f"its actor died {attempt} times ({type(error).__name__})"
                        replies |= {client: Reply(client, problem=why) for client in clients}
        for number, _, _ in under_way.values():
            # It may be stuck: what comes next must not wait behind it.
            ray.kill(self._actors[number])
            self._actors[number] = self._make(number)
        return replies

    def end(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)


def resources(options: Mapping[str, Any], there: Mapping[str, float]) -> tuple[int, float, float]:
    """(actors, cores of each, GPUs of each) from the fleet's options and what the cluster has.

    Raises ConfigError where it does not have that much.
    """
    cores, devices = there.get("CPU", 0.0), there.get("GPU", 0.0)
    gpus = options["gpus"] if options["gpus"] is not None else (1.0 if devices >= 1 else 0.0)
    usual = int(devices / gpus) if gpus else max(1, int(cores / (options["cpus"] or CORES_AN_ACTOR)))
    actors = options["actors"] or usual
    cpus = options["cpus"] or max(1.0, float(int(cores / max(1, actors))))
    if actors < 1 or actors * cpus > cores or actors * gpus > devices:
        raise ConfigError(
            f"fleet: {actors} actors of {cpus:g} cores and {gpus:g} GPUs are more than the {cores:g} cores and {devices:g} "
            "GPUs that Ray has; lower fleet.actors, fleet.cpus or fleet.gpus."
        )
    return actors, cpus, gpus


def _reach(address: str) -> None:
    """Raises OSError where nobody listens: Ray by itself waits five minutes for someone."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
        return


@contextmanager
def on_ray(config: Experiment) -> Iterator[FleetKind]:
    """The fleet of an experiment whose `fleet.name` is "ray"; its actors, and a cluster of its own, end with the context.

    Raises ConfigError where there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    options = config.fleet.options
    address = options.get("address")
    try:
        if address and address != "auto":
            _reach(address)
        # "local", or Ray joins whatever cluster it finds traces of; on the loopback interface, as it asks for no password.
        own = {} if address else {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f'fleet.address = "{address}": no Ray cluster answers ({" ".join(str(error).split())}).') from None
    posts: list[ActorPost] = []
    try:
        full = {key: options.get(key) for key in ("actors", "cpus", "gpus")}
        actors, cpus, gpus = resources(full, ray.cluster_resources())
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Actor)

        def make(site: Site) -> Fleet:
            if not posts:  # a run asks for its fleet more than once
                folder, home, threads = str(site.memory.absolute()), str(Path.cwd()), max(1, int(cpus))
                posts.append(ActorPost(actors, lambda number: remote.remote(folder, home, threads)))
            return RemoteFleet(posts[0], site.run, site.config, options["timeout"], site.last)

        yield FleetKind(make, here=False)
    finally:
        for post in posts:
            post.end()
        ray.shutdown()


__all__ = ["ATTEMPTS", "ActorPost", "on_ray", "resources", "split"]
