"""All clients in this process: one resident model, and the adapters of several clients trained in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from fedmllm.algorithms import ClientInfo, LocalResult, OwnTraining, RoundInfo, Update, complete, own_adapter
from fedmllm.algorithms.factors import as_fold, fold_of
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
Job = tuple[Tensors, float, Work]
"""A training, and before it what is added to the base: this share of an adapter, or a fold if the share is 0."""


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
        ordered = sorted(messages, key=lambda client: (-self._amount(client, info), client))
        size, updates = self._context.cohort, list[Update]()
        for start in range(0, len(ordered), size):
            self._context.model.progress("clients", start, len(ordered), f"of round {info.round + 1}")
            updates += self._train_cohort(ordered[start : start + size], info, messages)
        self._context.model.progress("clients", len(ordered), len(ordered), "")
        return updates

    def _amount(self, client: int, info: RoundInfo) -> int:
        """How many samples the client trains on."""
        table, size = self._context.table(client), len(self._context.data[client])
        steps = info.steps.get(client, size * table.epochs)
        return min(size * table.epochs, steps * table.batch_size * table.accumulate)

    def forget(self, round: int, clients: Sequence[int]) -> None:
        self._memory.forget(round, clients)

    def commit(self, round: int) -> None:
        self._memory.commit(round, self._took_part.pop(round, []))

    def personal(self, client: int, message: State, done: int) -> Tensors:
        return own_adapter(message, self._memory.load(client, done), self._context.initial)

    def _train_cohort(self, clients: Sequence[int], info: RoundInfo, messages: Mapping[int, State]) -> Iterator[Update]:
        prepared = [self._prepare(client, info, messages[client]) for client in clients]
        results = self._run([job for job, _, _ in prepared], info)
        own = iter(self._run([own for _, own, _ in prepared if own], info))
        for (_, has_own, finish), result in zip(prepared, results, strict=True):
            yield finish(replace(result, own=next(own).trained) if has_own else result)

    def _run(self, jobs: Sequence[Job], info: RoundInfo) -> list[LocalResult]:
        """The results of all trainings, in the order of `jobs`."""
        model, table = self._context.model, self._context.train.model_copy(update={"lr": info.lr})
        groups: dict[tuple[frozenset[tuple[str, int]], float, tuple[str, ...]], list[int]] = {}
        for number, (added, share, work) in enumerate(jobs):
            # The identity of the tensors, because every client has its own dictionary of them.
            identity = frozenset((name, id(tensor)) for name, tensor in added.items())
            groups.setdefault((identity, share, trainable(model, work)), []).append(number)
        results: dict[int, LocalResult] = {}
        # A pass has one base weight and one set of trained tensors; few algorithms need more than one group.
        for group in groups.values():
            added, share, _ = jobs[group[0]]
            model.adapter.set_fold(as_fold(added, share, info.adapter) if share else added)
            results |= zip(group, self._run_pass(model, [jobs[number][2] for number in group], table), strict=True)
        return [results[number] for number in range(len(jobs))]

    def _prepare(self, client: int, info: RoundInfo, message: State) -> tuple[Job, Job | None, Finish]:
        """The client's training, that of its own adapter if it has one, and what turns the results into its update and its new
        memory."""
        context, table = self._context, self._context.table(client)
        data, gap = context.in_round(client, info) if context.in_round else (context.data[client], context.gaps[client])
        info = replace(info, client=ClientInfo(client, gap, _shown(data)))
        memory = self._memory.load(client, info.round)
        received = complete(message, memory, context.initial)
        rule = context.algorithm.rule(received, memory, info)
        epochs = [stream(info.seed, "batches", client, info.round, epoch) for epoch in range(table.epochs)]
        steps = client_steps(data, table, epochs)

        def finish(result: LocalResult) -> Update:
            upload, remembered = context.algorithm.finish(result, received, memory, info)
            self._memory.save(client, info.round, remembered)
            return Update(client, upload, result.examples, result.steps, result.metrics)

        seed = seed_for(info.seed, "dropout", client, info.round)
        per_pass = len(steps) // table.epochs
        work = Work(steps[: info.steps.get(client)], received["adapter"], rule, seed, steps_per_pass=per_pass, client=client)
        own = context.algorithm.own(received, memory, info)
        return (fold_of(message), 0.0, work), _own_job(own, work, message) if own else None, finish


def _own_job(own: OwnTraining, work: Work, message: State) -> Job:
    """The training of a client's own adapter, over the steps of `work`."""
    work = replace(work, received=own.start, rule=own.rule, share=own.share)
    return (own.beside, 1 - own.share, work) if own.beside and own.share < 1 else (fold_of(message), 0.0, work)


def _shown(data: Sequence[Encoded]) -> dict[str, float]:
    """The share of the samples that shows each modality."""
    counts = {"image": sum(bool(e.pictures) for e in data), "text": sum(bool(e.text) for e in data)}
    return {modality: count / max(len(data), 1) for modality, count in counts.items()}


IN_PROCESS = FleetBackend(InProcessFleet)
