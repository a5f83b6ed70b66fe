"""A readable reference implementation of local training: one client, PEFT's own adapter, one tensor at a time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fedmllm.algorithms import LocalResult
from fedmllm.config import TrainTable
from fedmllm.models.mllm import MLLM
from fedmllm.tensors import Tensors
from fedmllm.training.cohort import Work


def train_naively(model: MLLM, work: Work, settings: TrainTable) -> LocalResult:
    adapter, rule = model.adapter, work.rule
    if rule.probe is not None:
        probed = replace(work, steps=work.steps[: work.steps_per_pass], rule=replace(rule, probe=None))
        rule = replace(rule, probe=None, frozen=rule.probe(train_naively(model, probed, settings)))
        adapter.set(work.received)
    settings = settings.model_copy(update={"lr": settings.lr * rule.lr_factor})
    adapter.set(work.received)
    rank = adapter.rank
    parameters = {name: p for name, p in adapter.parameters.items() if rule.trainable(name)}
    for name, parameter in adapter.parameters.items():
        parameter.requires_grad_(name in parameters)
    if settings.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            parameters.values(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(
            parameters.values(), settings.lr, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay
        )
    observed = {name: torch.zeros_like(adapter.part(name, p, rank)) for name, p in parameters.items()}
    total, examples = 0.0, 0
    for number, step in enumerate(work.steps):
        samples = [sample for batch in step for sample in batch]
        optimizer.zero_grad()
        for sample in samples:
            loss = model.loss([sample])
            total += loss.item()
            (loss / len(samples)).backward()
        penalty: Tensors = {}
        if rule.penalty is not None:
            current = {name: adapter.part(name, p.detach(), rank) for name, p in parameters.items()}
            penalty = rule.penalty(current, {name: work.received[name] for name in current}, number / len(work.steps))
        for name, p in parameters.items():
            assert p.grad is not None
            gradient, start = adapter.part(name, p.grad, rank), work.received[name]
            observed[name] += gradient / len(work.steps)
            with torch.no_grad():
                gradient += rule.proximal.get(name, 0.0) * (adapter.part(name, p, rank) - start)
                if rule.offset is not None and name in rule.offset:
                    gradient += rule.offset[name]
                if name in penalty:
                    gradient += penalty[name]
                if rule.frozen is not None and name in rule.frozen:
                    gradient *= 1 - rule.frozen[name]
        if settings.clip:
            nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
        optimizer.step()
        for name, frozen in (rule.frozen or {}).items():
            if name in parameters:
                with torch.no_grad():
                    adapter.part(name, parameters[name], rank)[frozen.bool()] = work.received[name][frozen.bool()]
        examples += len(samples)
    for parameter in adapter.parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    momentum = settings.momentum if settings.optimizer == "sgd" else 0.0
    mean = observed if rule.observe_gradient else None
    metrics = {"loss": total / max(examples, 1)}
    return LocalResult(work.received, adapter.get(), mean, examples, len(work.steps), settings.lr, metrics, momentum=momentum)
