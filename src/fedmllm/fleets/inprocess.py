"""All clients in this process: one resident model, each client's adapter swapped in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from fedmllm.algorithms import ClientInfo, RoundInfo, Update, complete
from fedmllm.algorithms.factors import fold_of
from fedmllm.federation import Fleet
from fedmllm.fleets import fleets
from fedmllm.fleets.base import Site
from fedmllm.fleets.memory import ClientMemory
from fedmllm.models.mllm import Encoded
from fedmllm.rng import seed_for, stream
from fedmllm.tensors import State, Tensors
from fedmllm.training.batches import plan
from fedmllm.training.local import LocalSettings, train_local


class InProcessFleet:
    """Trains the sampled clients one after the other. A client without samples sends an update of 0 examples."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._memory = ClientMemory(site.memory)
        self._last: list[int] = []

    def train(self, info: RoundInfo, messages: Mapping[int, State], lr: float) -> Sequence[Update]:
        self._last = list(info.sampled)
        return [self._train_one(client, info, messages[client], lr) for client in info.sampled]

    def forget(self, round: int, clients: Sequence[int]) -> None:
        self._memory.forget(round, clients)

    def commit(self, round: int) -> None:
        self._memory.commit(round, self._last)

    def personal(self, client: int, message: State, done: int) -> Tensors:
        return complete(message, self._memory.load(client, done), self._site.initial)["adapter"]

    def _train_one(self, client: int, info: RoundInfo, message: State, lr: float) -> Update:
        site, algorithm = self._site, self._site.algorithm
        info = replace(info, client=ClientInfo(client, site.gaps[client]))
        memory = self._memory.load(client, info.round)
        received = complete(message, memory, site.initial)
        rule = algorithm.rule(received, memory, info)
        site.model.adapter.set_fold(fold_of(message))
        data = site.data[client]
        epochs = [
            plan(
                [one.length for one in data],
                site.train.batch_size,
                site.train.accumulate,
                stream(info.seed, "batches", client, info.round, epoch),
            )
            for epoch in range(site.train.epochs)
        ]

        def steps() -> Iterator[list[list[Encoded]]]:
            for epoch in epochs:
                for step in epoch.steps:
                    yield [[data[i] for i in batch] for batch in step]

        result = train_local(
            site.model,
            steps(),
            received["adapter"],
            rule,
            LocalSettings.of(site.train, lr),
            seed_for(info.seed, "dropout", client, info.round),
        )
        upload, remembered = algorithm.finish(result, received, memory, info)
        self._memory.save(client, info.round, remembered)
        padding = sum(epoch.padding for epoch in epochs) / len(epochs)
        return Update(client, upload, result.examples, result.steps, {**result.metrics, "padding": padding})


@fleets.register("in-process")
def in_process() -> Callable[[Site], Fleet]:
    """All clients in this process, one after the other on one resident model."""
    return InProcessFleet
