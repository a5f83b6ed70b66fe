"""Ray: actors that each keep one model loaded and answer the jobs of one cohort at a time. An actor that dies is replaced.

Jobs and replies are the bytes that also travel over Flower. An actor keeps no state of a client: it receives the client's
memory with the job and returns it with the reply, and the memory is stored in the run directory, as in a single-process run.
Therefore any actor can train any client, on any machine, and nothing is lost with one that dies.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from fedmllm.federation import Fleet
from fedmllm.fleets.base import FleetBackend, FleetContext
from fedmllm.fleets.memory import ClientMemory
from fedmllm.fleets.options import RayOptions
from fedmllm.registry import plugin_files
from fedmllm.remote.cluster import actor_resources, cluster, cluster_resources
from fedmllm.remote.fleet import RemoteFleet
from fedmllm.remote.protocol import Job, Reply, parts_of, to_bytes
from fedmllm.remote.worker import Worker

ATTEMPTS = 3
"""How often a cohort is sent before its clients are given up because their actor died."""
Packed = tuple[bytes, bytes]
"""A job or a reply, and the client's memory before or after it."""


class Actor:
    """The object in an actor's process.

    `folder` is the working folder of the run, to which paths of the experiment are relative; `plugins` are the run's plug-in
    files, which must exist on the actor's machine.
    """

    def __init__(self, folder: str, threads: int, plugins: Sequence[Path]) -> None:
        import torch

        if Path(folder).is_dir():
            os.chdir(folder)
        torch.set_num_threads(threads)
        self._memory = Path(tempfile.gettempdir(), f"fedmllm-{secrets.token_hex(8)}")
        self._worker = Worker(self._memory, plugins=plugins)

    def answer(self, work: Sequence[Packed]) -> list[Packed]:
        """For each client's (job, memory) its (reply, new memory), in the same order."""
        jobs = [Job.of(*parts_of(job)) for job, _ in work]
        memory = ClientMemory(self._memory / jobs[0].run)
        try:
            for job, (_, before) in zip(jobs, work, strict=True):
                memory.save(job.client, job.last, parts_of(before)[1])
            replies = self._worker.answer(jobs)
            after = [Reply(groups=memory.load(job.client, job.round + 1)) for job in jobs]
        finally:
            shutil.rmtree(self._memory, ignore_errors=True)
        return [(to_bytes(reply), to_bytes(new)) for reply, new in zip(replies, after, strict=True)]


def split(clients: Sequence[int], actors: int) -> list[list[int]]:
    """The clients in consecutive parts of almost equal size, at most one per actor.

    A client therefore tends to reach the same actor in every round, which has already encoded its samples.
    """
    count = min(actors, len(clients))
    return [list(clients[len(clients) * i // count : len(clients) * (i + 1) // count]) for i in range(count)]


class ActorTransport:
    """Sends each actor the jobs of its clients. `start(number)` starts an actor."""

    def __init__(self, actors: int, start: Callable[[int], Any], memory: ClientMemory) -> None:
        self._start, self._memory = start, memory
        self._actors = [start(number) for number in range(actors)]

    def exchange(self, jobs: Mapping[int, Job], timeout: float) -> Mapping[int, Reply]:
        """The reply of each client whose actor answers in time; if its actor died too often, a reply that says so."""
        import ray

        end = time.monotonic() + timeout
        packed = {client: self._pack(job) for client, job in jobs.items()}
        pending: dict[Any, tuple[int, list[int], int]] = {}
        replies: dict[int, Reply] = {}

        def send(number: int, clients: list[int], attempt: int) -> None:
            reference = self._actors[number].answer.remote([packed[client] for client in clients])
            pending[reference] = number, clients, attempt

        for number, clients in enumerate(split(sorted(jobs), len(self._actors))):
            send(number, clients, 1)
        while pending and (left := end - time.monotonic()) > 0:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=left)
            for reference in ready:
                number, clients, attempt = pending.pop(reference)
                try:
                    for client, answer in zip(clients, ray.get(reference), strict=True):
                        replies[client] = self._unpack(jobs[client], answer)
                except ray.exceptions.RayActorError as error:
                    self._actors[number] = self._start(number)
                    if attempt < ATTEMPTS:
                        send(number, clients, attempt + 1)
                    else:
                        problem = f"its actor died {attempt} times ({type(error).__name__})"
                        replies |= {client: Reply(client, problem=problem) for client in clients}
                except ray.exceptions.RayError as error:
                    problem = f"{type(error).__name__} in its actor"
                    replies |= {client: Reply(client, problem=problem) for client in clients}
        for number, _, _ in pending.values():
            # The actor may be stuck, and the next jobs must not wait for it.
            ray.kill(self._actors[number])
            self._actors[number] = self._start(number)
        return replies

    def _pack(self, job: Job) -> Packed:
        self._memory.roll_back(job.client, min(job.last, job.round - 1))
        return to_bytes(job), to_bytes(Reply(groups=self._memory.load(job.client, job.round)))

    def _unpack(self, job: Job, answer: Packed) -> Reply:
        reply = Reply.of(*parts_of(answer[0]))
        if job.kind == "train" and not reply.problem:
            self._memory.save(job.client, job.round, parts_of(answer[1])[1])
        return reply

    def stop(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)


@contextmanager
def on_ray(options: RayOptions) -> Iterator[FleetBackend]:
    """The backend of an experiment whose `fleet.name` is "ray". Its actors, and a cluster that it started, end with the
    context."""
    with cluster(options.address), ExitStack() as undo:
        import ray

        actors, cpus, gpus = actor_resources(options, cluster_resources())
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(Actor)
        arguments = str(Path.cwd()), max(1, int(cpus)), plugin_files()

        @cache  # a run may open its fleet more than once
        def transport(memory: Path) -> ActorTransport:
            started = ActorTransport(actors, lambda _: remote.remote(*arguments), ClientMemory(memory))
            undo.callback(started.stop)
            return started

        def open_fleet(context: FleetContext) -> Fleet:
            return RemoteFleet(transport(context.memory), context.run, context.config, options.timeout, context.last)

        yield FleetBackend(open_fleet, local=False)
