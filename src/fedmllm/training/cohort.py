"""Local training of several clients in one pass over the shared frozen backbone, with the same results as one by one.

Every step processes one micro-batch of each client, side by side. A client's rows are combined only with its own adapter,
gradient norm and optimizer state, so its result does not depend on the other clients except for the order of float sums.
Clients are sorted by their number of steps, so those that have finished are removed from the end of the stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fedmllm.algorithms import LocalResult, LocalRule
from fedmllm.config import TrainTable
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.stack import Extent, Stack
from fedmllm.tensors import Tensors
from fedmllm.training.meter import Meter
from fedmllm.training.observing import base_gradient, loss_before, parts_that_fit

Step = Sequence[Sequence[Encoded]]
"""One optimizer step: micro-batches whose gradients are accumulated."""


@dataclass(frozen=True)
class Work:
    """One client's training: from the adapter `received`, through `steps`, under `rule`. Only dropout uses `seed`. The model
    computes with `share` times the adapter. `client` is for people only."""

    steps: Sequence[Step]
    received: Tensors
    rule: LocalRule
    seed: int
    steps_per_pass: int | None = None
    """The number of steps that one pass over the samples takes; None if all steps are one pass."""
    share: float = 1.0
    client: int = 0

    @property
    def first_pass(self) -> list[Sequence[Encoded]]:
        """The batches of one pass over the samples, without empty ones."""
        return [batch for step in self.steps[: self.steps_per_pass] for batch in step if batch]


def trainable(model: MLLM, work: Work) -> tuple[str, ...]:
    """The adapter's tensors that the client's rule trains. Raises ValueError if there is none."""
    names = tuple(name for name in model.adapter.parameters if work.rule.trainable(name))
    if not names:
        raise ValueError("the algorithm's rule leaves no tensor to train")
    return names


def train_cohort(model: MLLM, works: Sequence[Work], train: TrainTable) -> list[LocalResult]:
    """The results of all clients, in the order of `works`. A step's gradient is the mean over its samples.

    `train.lr` is the learning rate of this round; each client's optimizer starts with fresh state.
    A tensor that a step's samples do not use (an adapter on the vision tower if no sample has a picture) gets the gradient 0.
    The model's own adapter and the global random generator are left unchanged. Raises ValueError if the rules train no
    tensor or different ones, or if this kind of adapter trains only one client at a time.

    If the memory of a GPU is full, fewer clients train in one pass, and then fewer samples of each, from their start: nothing
    is left of the failed attempt. Raises RunError if one sample is too much.
    """
    names, factor = trainable(model, works[0]), works[0].rule.lr_factor
    if any(trainable(model, work) != names or work.rule.lr_factor != factor for work in works[1:]):
        raise ValueError("the clients of a cohort must train the same tensors at the same rate")
    if len(works) > 1 and not model.adapter.stacks:
        raise ValueError("this kind of adapter trains only one client at a time")
    if any(work.rule.probe for work in works):
        works = _after_probing(model, works, train)
    train = train.model_copy(update={"lr": train.lr * factor})
    order = sorted(range(len(works)), key=lambda i: -len(works[i].steps))
    limits, largest = model.limits, max((len(batch) for work in works for step in work.steps for batch in step), default=0)
    compute = partial(_train_side_by_side, model, names, train)
    smaller = lambda: limits.samples.halve(limits.samples.size(largest))  # noqa: E731 (as short as it is)
    results = list(limits.in_parts(limits.clients, [works[i] for i in order], compute, smaller))
    return [results[order.index(i)] for i in range(len(works))]


def _train_side_by_side(model: MLLM, names: Sequence[str], train: TrainTable, works: Sequence[Work]) -> list[LocalResult]:
    return _Cohort(model, works, names, train).train()


def _after_probing(model: MLLM, works: Sequence[Work], train: TrainTable) -> list[Work]:
    """The works with what each client freezes after one pass over its samples."""
    passes = [replace(w, steps=w.steps[: w.steps_per_pass], rule=replace(w.rule, probe=None)) for w in works]
    results = train_cohort(model, passes, train)
    return [
        replace(work, rule=replace(work.rule, probe=None, frozen=work.rule.probe(result))) if work.rule.probe else work
        for work, result in zip(works, results, strict=True)
    ]


def _optimizer(parameters: Sequence[nn.Parameter], train: TrainTable) -> torch.optim.Optimizer:
    """A fused optimizer over the parameters."""
    decay = train.weight_decay
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, train.lr, momentum=train.momentum, weight_decay=decay, fused=True)
    betas = (train.beta1, train.beta2)
    return torch.optim.AdamW(parameters, train.lr, betas=betas, eps=train.eps, weight_decay=decay, fused=True)


class _Cohort:
    """The state of local training. The works are sorted by their number of steps, the longest first."""

    def __init__(self, model: MLLM, works: Sequence[Work], names: Sequence[str], train: TrainTable) -> None:
        self._model, self._works, self._table = model, works, train
        self._before = [
            loss_before(model, work.received, work.first_pass) if work.rule.observe_loss else None for work in works
        ]
        self._base = [base_gradient(model, work.first_pass, work.seed) if work.rule.observe_base else None for work in works]
        self._stack = stack = Stack(
            model.adapter,
            [w.received for w in works],
            names,
            [w.seed for w in works],
            [w.share for w in works],
            train.checkpointing,
        )
        self._optimizer = _optimizer(stack.rows, train)
        rules = [work.rule for work in works]
        # Each of these is None if no client needs it.
        self._observed = torch.zeros_like(stack.values) if any(rule.observe_gradient for rule in rules) else None
        self._start = self._strength = self._offset = self._frozen = None
        if any(rule.proximal or rule.frozen or rule.penalty for rule in rules):
            self._start = stack.values.clone()
        if any(rule.proximal for rule in rules):
            self._strength = stack.constants([rule.proximal for rule in rules])
        if any(rule.offset for rule in rules):
            self._offset = stack.matrix([rule.offset or {} for rule in rules])
        if any(rule.frozen for rule in rules):
            self._frozen = stack.matrix([rule.frozen or {} for rule in rules]).bool()
        # Kept as tensors: reading a number from a GPU would wait for it at every step.
        self._loss = torch.zeros(len(works), device=stack.values.device)
        self._slots = [0] * len(works)
        longest = max(len(work.steps) for work in works)
        self._meter = Meter(model.progress, [work.client for work in works], longest, self._loss)

    def train(self) -> list[LocalResult]:
        counts = [len(work.steps) for work in self._works]
        devices = sorted({parameter.device.index for parameter in self._model.adapter.parameters.values() if parameter.is_cuda})
        # Adapters other than LoRA, which train alone, draw their dropout from the global generator.
        with torch.random.fork_rng(devices=devices), ExitStack() as mode:
            torch.manual_seed(self._works[0].seed)
            if not self._model.adapter.stacks:
                self._model.model.train()
                mode.callback(self._model.model.eval)
            done = 0
            while done < counts[0]:
                active = sum(count > done for count in counts)
                until = counts[active - 1]
                for client, row in enumerate(self._stack.rows):  # the optimizer skips rows without a gradient
                    row.grad = self._stack.grads[client] if client < active else None
                with self._model.using(self._stack, active):
                    for number in range(done, until):
                        steps = [work.steps[number] for work in self._works[:active]]
                        self._step(steps, number)
                        self._meter.step(number + 1, [batch for step in steps for batch in step])
                done = until
        return [self._result(client) for client in range(len(self._works))]

    def _step(self, steps: Sequence[Step], number: int) -> None:
        active = len(steps)
        for rows, weights, extents, part in self._micros(steps):
            self._stack.begin(extents, part)
            losses = self._model.losses(rows).view(active, -1)
            if losses.requires_grad:
                (losses * weights).sum().backward()  # type: ignore[no-untyped-call]
            self._loss[:active] += (losses.detach() * (weights > 0)).sum(1)
        self._descend(active, number)

    @torch.no_grad()
    def _descend(self, active: int, number: int) -> None:
        """g ← g + μ (w − w_received) + offset + penalty, clipped per client; take one optimizer step, put frozen entries back,
        and reset the gradients to 0."""
        grads, values = self._stack.grads[:active], self._stack.values[:active]
        if self._observed is not None:
            self._observed[:active] += grads
        if self._start is not None and self._strength is not None:
            grads.addcmul_(self._strength[:active], values - self._start[:active])
        if self._offset is not None:
            grads += self._offset[:active]
        for client, work in enumerate(self._works[:active]):
            if work.rule.penalty is not None and self._start is not None:
                w, start, g = (self._stack.parts(client, rows[client]) for rows in (values, self._start, grads))
                for name, gradient in work.rule.penalty(w, start, number / len(work.steps)).items():
                    g[name] += gradient
        if self._frozen is not None:
            grads.masked_fill_(self._frozen[:active], 0.0)
        if self._table.clip:
            norms = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
            grads *= (self._table.clip / (norms + 1e-6)).clamp(max=1.0)
        self._optimizer.step()
        if self._frozen is not None and self._start is not None:  # the optimizer's weight decay moved them
            values.copy_(self._start[:active].where(self._frozen[:active], values))
        grads.zero_()

    def _micros(self, steps: Sequence[Step]) -> Iterator[tuple[list[Encoded], Tensor, list[Extent], slice]]:
        """(rows, weights (clients, samples), extents, part) of each forward pass of a step, with equally many rows per client.

        A client with fewer micro-batches or samples is filled up with rows of weight 0 that repeat the shortest sample. A
        micro-batch that does not fit in memory is computed in parts.
        """
        totals = [sum(len(batch) for batch in step) for step in steps]
        for i in range(max(len(step) for step in steps)):
            batches = [step[i] if i < len(step) else [] for step in steps]
            samples = max(map(len, batches))
            filler = min((sample for batch in batches for sample in batch), key=lambda sample: sample.length)
            padded: list[list[Encoded]] = []
            weights: list[list[float]] = []
            for batch, total in zip(batches, totals, strict=True):
                missing = samples - len(batch)
                padded.append([*batch, *[filler] * missing])
                weights.append([1 / total] * len(batch) + [0.0] * missing)
            longest = max(sample.length for batch in batches for sample in batch)
            for client in range(len(steps)):
                self._slots[client] += samples * longest
            extents = [(len(batch), self._model.width(batch)) for batch in batches]
            for part in parts_that_fit(self._model, samples):
                rows = [sample for of_client in padded for sample in of_client[part]]
                yield rows, torch.tensor([row[part] for row in weights], device=self._loss.device), extents, part

    def _result(self, client: int) -> LocalResult:
        work, stack, table = self._works[client], self._stack, self._table
        steps = len(work.steps)
        samples = [sample for step in work.steps for batch in step for sample in batch]
        mean = None
        if self._observed is not None and work.rule.observe_gradient:
            mean = stack.tensors(client, self._observed[client] / max(steps, 1))
        padding = 1 - sum(sample.length for sample in samples) / self._slots[client] if samples else 0.0
        return LocalResult(
            received=work.received,
            trained=stack.trained(client, work.received),
            mean_gradient=mean,
            examples=len(samples),
            steps=steps,
            lr=table.lr,
            metrics={"loss": float(self._loss[client]) / max(len(samples), 1), "padding": padding},
            momentum=table.momentum if table.optimizer == "sgd" else 0.0,
            loss_before=self._before[client],
            base_gradient=self._base[client],
        )
