"""All clients in this process: one resident model, and the adapters of several clients trained in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from fedmllm.algorithms import ClientInfo, LocalResult, RoundInfo, Update, complete
from fedmllm.algorithms.factors import fold_of
from fedmllm.config import TrainTable
from fedmllm.fleets.base import FleetBackend, FleetContext
from fedmllm.fleets.memory import ClientMemory
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.rng import seed_for, stream
from fedmllm.tensors import State, Tensors
from fedmllm.training.batches import client_steps
from fedmllm.training.cohort import Work, train_cohort, trainable

TrainCohort = Callable[[MLLM, Sequence[Work], TrainTable], Sequence[LocalResult]]
Finish = Callable[[LocalResult], Update]


class InProcessFleet:
    """Trains the sampled clients, one cohort at a time. A client without samples sends an update of 0 examples.

    `train` replaces `train_cohort`, for example with a function that also measures its time.
    """

    def __init__(self, context: FleetContext, train: TrainCohort = train_cohort) -> None:
        self._context, self._run_pass = context, train
        self._memory = ClientMemory(context.memory)
        self._took_part: dict[int, list[int]] = {}

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        self._took_part[info.round] = sorted(messages)
        # Clients with similar numbers of steps train together, so that few of them idle while others finish.
        ordered = sorted(messages, key=lambda client: (-len(self._context.data[client]), client))
        size = self._context.cohort
        return [
            update
            for start in range(0, len(ordered), size)
            for update in self._train_cohort(ordered[start : start + size], info, messages)
        ]

    def forget(self, round: int, clients: Sequence[int]) -> None:
        self._memory.forget(round, clients)

    def commit(self, round: int) -> None:
        self._memory.commit(round, self._took_part.pop(round, []))

    def personal(self, client: int, message: State, done: int) -> Tensors:
        return complete(message, self._memory.load(client, done), self._context.initial)["adapter"]

    def _train_cohort(self, clients: Sequence[int], info: RoundInfo, messages: Mapping[int, State]) -> Iterator[Update]:
        model, table = self._context.model, self._context.train.model_copy(update={"lr": info.lr})
        groups: dict[tuple[frozenset[tuple[str, int]], tuple[str, ...]], list[tuple[Tensors, Work, Finish]]] = {}
        for client in clients:
            fold, work, finish = self._prepare(client, info, messages[client])
            # The identity of the tensors, because every client has its own dictionary of them.
            identity = frozenset((name, id(tensor)) for name, tensor in fold.items())
            groups.setdefault((identity, trainable(model, work)), []).append((fold, work, finish))
        # A pass has one base weight and one set of trained tensors; few algorithms need more than one group.
        for group in groups.values():
            model.adapter.set_fold(group[0][0])
            results = self._run_pass(model, [work for _, work, _ in group], table)
            for (_, _, finish), result in zip(group, results, strict=True):
                yield finish(result)

    def _prepare(self, client: int, info: RoundInfo, message: State) -> tuple[Tensors, Work, Finish]:
        """The client's fold, its training, and what turns the result into its update and its new memory."""
        context = self._context
        data, gap = context.in_round(client, info) if context.in_round else (context.data[client], context.gaps[client])
        info = replace(info, client=ClientInfo(client, gap, _shown(data)))
        memory = self._memory.load(client, info.round)
        received = complete(message, memory, context.initial)
        rule = context.algorithm.rule(received, memory, info)
        epochs = [stream(info.seed, "batches", client, info.round, epoch) for epoch in range(context.train.epochs)]
        steps = client_steps(data, context.train, epochs)

        def finish(result: LocalResult) -> Update:
            upload, remembered = context.algorithm.finish(result, received, memory, info)
            self._memory.save(client, info.round, remembered)
            return Update(client, upload, result.examples, result.steps, result.metrics)

        seed = seed_for(info.seed, "dropout", client, info.round)
        work = Work(steps, received["adapter"], rule, seed, steps_per_pass=len(steps) // context.train.epochs)
        return fold_of(message), work, finish


def _shown(data: Sequence[Encoded]) -> dict[str, float]:
    """The share of the samples that shows each modality."""
    counts = {"image": sum(e.picture is not None for e in data), "text": sum(bool(e.text) for e in data)}
    return {modality: count / max(len(data), 1) for modality, count in counts.items()}


IN_PROCESS = FleetBackend(InProcessFleet)
