"""Ray: actors that each keep one model and answer the jobs of a cohort at a time; one that dies is replaced.

Jobs and replies are the bytes that travel over Flower too. An actor remembers nothing of a client: what a client remembers
travels with its job, comes back with its reply and is in the run directory, as in one process. So any actor may take any
client, on any machine, and one that dies loses nothing.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedmllm.errors import ConfigError
from fedmllm.federation import Fleet
from fedmllm.fleets.base import FleetBackend, FleetContext
from fedmllm.fleets.memory import ClientMemory
from fedmllm.fleets.options import RayOptions
from fedmllm.remote.fleet import RemoteFleet
from fedmllm.remote.protocol import Job, Reply, parts_of, to_bytes
from fedmllm.remote.site import Worker

ATTEMPTS = 3
"""How often a cohort is sent out before the death of its actor is taken for the answer."""
CORES_AN_ACTOR = 4
"""Where there is no GPU."""
Packed = tuple[bytes, bytes]
"""A job or a reply, and what its client remembers."""


class _Actor:
    """What lives in an actor's process."""

    def __init__(self, home: str, threads: int) -> None:
        import torch

        if Path(home).is_dir():  # relative paths of the experiment mean what they mean where it was started
            os.chdir(home)
        torch.set_num_threads(threads)
        self._folder = Path(tempfile.gettempdir(), f"fedmllm-{secrets.token_hex(8)}")
        self._worker = Worker(self._folder)

    def answer(self, work: Sequence[Packed]) -> list[Packed]:
        """For each client's (job, memory) its (reply, new memory), in their order."""
        jobs = [Job.of(*parts_of(job)) for job, _ in work]
        memory = ClientMemory(self._folder / jobs[0].run)
        try:
            for job, (_, before) in zip(jobs, work, strict=True):
                memory.save(job.client, job.last, parts_of(before)[1])
            replies = self._worker.answer(jobs)
            after = [Reply(groups=memory.load(job.client, job.round + 1)) for job in jobs]
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        return [(to_bytes(reply), to_bytes(new)) for reply, new in zip(replies, after, strict=True)]


def split(clients: Sequence[int], actors: int) -> list[list[int]]:
    """The clients in as many runs of almost equal length, none empty. A client that takes part again is likely to find its
    samples encoded: the same clients go the same way."""
    count = min(actors, len(clients))
    bounds = [len(clients) * i // count for i in range(count + 1)] if count else []
    return [list(clients[a:b]) for a, b in pairwise(bounds)]


class ActorTransport:
    """`make(number)` starts an actor."""

    def __init__(self, actors: int, make: Callable[[int], Any], memory: ClientMemory) -> None:
        self._make, self._memory = make, memory
        self._actors = [make(number) for number in range(actors)]

    def exchange(self, jobs: Mapping[int, Job], timeout: float) -> Mapping[int, Reply]:
        """A reply of each client whose actor answers in time; where its actor died too often, one that says so."""
        import ray

        end = time.monotonic() + timeout
        packed = {client: self._pack(job) for client, job in jobs.items()}
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
                    for client, answer in zip(clients, ray.get(reference), strict=True):
                        replies[client] = self._unpack(jobs[client], answer)
                except ray.exceptions.RayActorError as error:
                    self._actors[number] = self._make(number)
                    if attempt < ATTEMPTS:
                        send(number, clients, attempt + 1)
                    else:
                        why = f"its actor died {attempt} times ({type(error).__name__})"
                        replies |= {client: Reply(client, problem=why) for client in clients}
                except ray.exceptions.RayError as error:
                    why = f"{type(error).__name__} in its actor"
                    replies |= {client: Reply(client, problem=why) for client in clients}
        for number, _, _ in under_way.values():
            # It may be stuck: what comes next must not wait behind it.
            ray.kill(self._actors[number])
            self._actors[number] = self._make(number)
        return replies

    def _pack(self, job: Job) -> Packed:
        self._memory.go_back(job.client, min(job.last, job.round - 1))
        return to_bytes(job), to_bytes(Reply(groups=self._memory.load(job.client, job.round)))

    def _unpack(self, job: Job, answer: Packed) -> Reply:
        reply = Reply.of(*parts_of(answer[0]))
        if job.kind == "train" and not reply.problem:
            self._memory.save(job.client, job.round, parts_of(answer[1])[1])
        return reply

    def end(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)


def room() -> dict[str, float]:
    """What the cluster has: `CPU` and `GPU` in all, and how many cores its largest machine."""
    import ray

    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    total = {kind: sum(float(has.get(kind, 0.0)) for has in machines) for kind in ("CPU", "GPU")}
    # Nothing that asks for more than one machine has would ever start.
    return total | {LARGEST: max((float(has.get("CPU", 0.0)) for has in machines), default=0.0)}


LARGEST = "CPU of one machine"
LESS = "fleet.actors, fleet.cpus or fleet.gpus"


def resources(options: RayOptions, there: Mapping[str, float], less: str = LESS) -> tuple[int, float, float]:
    """(actors, cores of each, GPUs of each) from the fleet's options and what there is (`room`). `less` is what to lower.

    Raises ConfigError where it does not have that much.
    """
    cores, devices = there.get("CPU", 0.0), there.get("GPU", 0.0)
    gpus = options.gpus if options.gpus is not None else (1.0 if devices >= 1 else 0.0)
    usual = int(devices / gpus) if gpus else max(1, int(cores / (options.cpus or CORES_AN_ACTOR)))
    actors = options.actors or usual
    most = there.get(LARGEST, cores)
    cpus = options.cpus or min(most, max(1.0, float(int(cores / max(1, actors)))))
    if actors < 1 or actors * cpus > cores or cpus > most or actors * gpus > devices:
        raise ConfigError(
            f"fleet: {actors} actors of {cpus:g} cores and {gpus:g} GPUs are more than the {cores:g} cores and {devices:g} "
            f"GPUs that Ray has; lower {less}."
        )
    return actors, cpus, gpus


def _reach(address: str) -> None:
    """Raises OSError where nobody listens: Ray by itself waits five minutes for someone."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
        return


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A Ray cluster: that at `address`, or one on this machine which ends with the context. Raises ConfigError where there is
    none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    try:
        if address and address != "auto":
            _reach(address)
        # "local", or Ray joins whatever cluster it finds traces of; on the loopback interface, as it asks for no password.
        own = {} if address else {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f'address = "{address}": no Ray cluster answers ({" ".join(str(error).split())}).') from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def on_ray(options: RayOptions) -> Iterator[FleetBackend]:
    """The fleets of an experiment whose `fleet.name` is "ray"; its actors, and a cluster of its own, end with the context."""
    posts: list[ActorTransport] = []
    with cluster(options.address):
        import ray

        try:
            actors, cpus, gpus = resources(options, room())
            remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Actor)

            def make(site: FleetContext) -> Fleet:
                if not posts:  # a run asks for its fleet more than once
                    home, threads = str(Path.cwd()), max(1, int(cpus))
                    posts.append(ActorTransport(actors, lambda number: remote.remote(home, threads), ClientMemory(site.memory)))
                return RemoteFleet(posts[0], site.run, site.config, options.timeout, site.last)

            yield FleetBackend(make, local=False)
        finally:
            for post in posts:
                post.end()


__all__ = ["ATTEMPTS", "ActorTransport", "Packed", "cluster", "on_ray", "resources", "room", "split"]
