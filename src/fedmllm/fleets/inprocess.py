"""All clients in this process: one resident model, the sampled clients' adapters stacked beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fedmllm.algorithms import ClientInfo, RoundInfo, Update, complete
from fedmllm.algorithms.factors import fold_of
from fedmllm.fleets import fleets
from fedmllm.fleets.base import FleetKind, Site
from fedmllm.fleets.memory import ClientMemory
from fedmllm.rng import seed_for, stream
from fedmllm.tensors import State, Tensors
from fedmllm.training.batches import plan
from fedmllm.training.cohort import train_cohort, trainable
from fedmllm.training.local import LocalSettings, Work


@dataclass(frozen=True)
class _Ready:
    """A client about to train."""

    info: RoundInfo
    received: State
    memory: State
    fold: Tensors
    work: Work


class InProcessFleet:
    """Trains the sampled clients cohort by cohort. A client without samples sends an update of 0 examples."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._memory = ClientMemory(site.memory)
        self._took_part: dict[int, list[int]] = {}

    def train(self, info: RoundInfo, messages: Mapping[int, State], lr: float) -> Sequence[Update]:
        self._took_part[info.round] = sorted(messages)
        settings = LocalSettings.of(self._site.train, lr)
        # Clients with as many steps train together, so that few stand idle while others finish.
        waiting = sorted(messages, key=lambda client: (-len(self._site.data[client]), client))
        size = self._site.cohort
        return [
            update
            for start in range(0, len(waiting), size)
            for update in self._train_together(waiting[start : start + size], info, messages, settings)
        ]

    def forget(self, round: int, clients: Sequence[int]) -> None:
        self._memory.forget(round, clients)

    def commit(self, round: int) -> None:
        self._memory.commit(round, self._took_part.pop(round))

    def personal(self, client: int, message: State, done: int) -> Tensors:
        return complete(message, self._memory.load(client, done), self._site.initial)["adapter"]

    def _train_together(
        self, clients: Sequence[int], info: RoundInfo, messages: Mapping[int, State], settings: LocalSettings
    ) -> Iterator[Update]:
        site, algorithm = self._site, self._site.algorithm
        alike: dict[tuple[frozenset[tuple[str, int]], tuple[str, ...]], list[_Ready]] = {}
        for client in clients:
            ready = self._prepare(client, info, messages[client])
            # By the tensors of the fold: each client has a dictionary of its own.
            fold = frozenset((name, id(tensor)) for name, tensor in ready.fold.items())
            alike.setdefault((fold, trainable(site.model, ready.work)), []).append(ready)
        # One base weight and one set of trained tensors to a pass; only an unusual algorithm has several here.
        for group in alike.values():
            site.model.adapter.set_fold(group[0].fold)
            results = train_cohort(site.model, [ready.work for ready in group], settings)
            for ready, result in zip(group, results, strict=True):
                upload, remembered = algorithm.finish(result, ready.received, ready.memory, ready.info)
                client = ready.info.me.client
                self._memory.save(client, info.round, remembered)
                yield Update(client, upload, result.examples, result.steps, result.metrics)

    def _prepare(self, client: int, info: RoundInfo, message: State) -> _Ready:
        site, data = self._site, self._site.data[client]
        info = replace(info, client=ClientInfo(client, site.gaps[client]))
        memory = self._memory.load(client, info.round)
        received = complete(message, memory, site.initial)
        rule = site.algorithm.rule(received, memory, info)
        lengths = [one.length for one in data]
        size, accumulate = site.train.batch_size, site.train.accumulate
        steps = [
            [[data[i] for i in batch] for batch in step]
            for epoch in range(site.train.epochs)
            for step in plan(lengths, size, accumulate, stream(info.seed, "batches", client, info.round, epoch)).steps
        ]
        seed = seed_for(info.seed, "dropout", client, info.round)
        return _Ready(info, received, memory, fold_of(message), Work(steps, received["adapter"], rule, seed))


@fleets.register("in-process")
def in_process() -> FleetKind:
    """All clients in this process on one resident model, `train.cohort` of them in one pass."""
    return FleetKind(InProcessFleet)
