"""All clients in this process: one resident model, and the adapters of several clients trained in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fedmllm.algorithms import ClientInfo, RoundInfo, Update, complete
from fedmllm.algorithms.factors import fold_of
from fedmllm.fleets.base import FleetBackend, FleetContext
from fedmllm.fleets.memory import ClientMemory
from fedmllm.rng import seed_for, stream
from fedmllm.tensors import State, Tensors
from fedmllm.training.batches import client_steps
from fedmllm.training.cohort import train_cohort, trainable
from fedmllm.training.local import LocalSettings, Work


@dataclass(frozen=True)
class _Ready:
    """A client that is about to train."""

    info: RoundInfo
    received: State
    memory: State
    fold: Tensors
    work: Work


class InProcessFleet:
    """Trains the sampled clients, one cohort at a time. A client without samples sends an update of 0 examples."""

    def __init__(self, context: FleetContext) -> None:
        self._context = context
        self._memory = ClientMemory(context.memory)
        self._took_part: dict[int, list[int]] = {}

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        self._took_part[info.round] = sorted(messages)
        settings = LocalSettings.of(self._context.train, info.lr)
        # Clients with similar numbers of steps train together, so that few of them idle while others finish.
        ordered = sorted(messages, key=lambda client: (-len(self._context.data[client]), client))
        size = self._context.cohort
        return [
            update
            for start in range(0, len(ordered), size)
            for update in self._train_cohort(ordered[start : start + size], info, messages, settings)
        ]

    def forget(self, round: int, clients: Sequence[int]) -> None:
        self._memory.forget(round, clients)

    def commit(self, round: int) -> None:
        self._memory.commit(round, self._took_part.pop(round))

    def personal(self, client: int, message: State, done: int) -> Tensors:
        return complete(message, self._memory.load(client, done), self._context.initial)["adapter"]

    def _train_cohort(
        self, clients: Sequence[int], info: RoundInfo, messages: Mapping[int, State], settings: LocalSettings
    ) -> Iterator[Update]:
        context, algorithm = self._context, self._context.algorithm
        groups: dict[tuple[frozenset[tuple[str, int]], tuple[str, ...]], list[_Ready]] = {}
        for client in clients:
            ready = self._prepare(client, info, messages[client])
            # The identity of the tensors, because every client has its own dictionary of them.
            fold = frozenset((name, id(tensor)) for name, tensor in ready.fold.items())
            groups.setdefault((fold, trainable(context.model, ready.work)), []).append(ready)
        # A pass has one base weight and one set of trained tensors; few algorithms need more than one group.
        for group in groups.values():
            context.model.adapter.set_fold(group[0].fold)
            results = train_cohort(context.model, [ready.work for ready in group], settings)
            for ready, result in zip(group, results, strict=True):
                upload, remembered = algorithm.finish(result, ready.received, ready.memory, ready.info)
                client = ready.info.me.client
                self._memory.save(client, info.round, remembered)
                yield Update(client, upload, result.examples, result.steps, result.metrics)

    def _prepare(self, client: int, info: RoundInfo, message: State) -> _Ready:
        context, data = self._context, self._context.data[client]
        info = replace(info, client=ClientInfo(client, context.gaps[client]))
        memory = self._memory.load(client, info.round)
        received = complete(message, memory, context.initial)
        rule = context.algorithm.rule(received, memory, info)
        epochs = [stream(info.seed, "batches", client, info.round, epoch) for epoch in range(context.train.epochs)]
        steps = client_steps(data, context.train, epochs)
        seed = seed_for(info.seed, "dropout", client, info.round)
        work = Work(steps, received["adapter"], rule, seed, steps_per_pass=len(steps) // context.train.epochs)
        return _Ready(info, received, memory, fold_of(message), work)


IN_PROCESS = FleetBackend(InProcessFleet)
