"""One client's local training: `train_local` runs the steps it is given and knows nothing of the federation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedmllm.algorithms import LocalResult, LocalRule
from fedmllm.config import TrainTable
from fedmllm.models.mllm import MLLM, Encoded
from fedmllm.tensors import Tensors


@dataclass(frozen=True)
class LocalSettings:
    """The optimizer of one client round; its state is fresh each time. `clip` is the largest gradient norm, 0 for none."""

    optimizer: str
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    momentum: float
    clip: float

    @classmethod
    def of(cls, train: TrainTable, lr: float) -> LocalSettings:
        betas = (train.beta1, train.beta2)
        return cls(train.optimizer, lr, train.weight_decay, betas, train.momentum, train.clip)


def _optimizer(parameters: list[nn.Parameter], settings: LocalSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
    return torch.optim.AdamW(parameters, settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True)


@torch.no_grad()
def apply_rule(parameters: dict[str, nn.Parameter], rule: LocalRule, received: Tensors) -> None:
    """g ← g + μ (w − w_received) + offset, in place, for the parameters that have a gradient."""
    for name, parameter in parameters.items():
        if parameter.grad is None:
            continue
        if strength := rule.proximal.get(name, 0.0):
            parameter.grad.add_(parameter - received[name], alpha=strength)
        if rule.offset is not None and name in rule.offset:
            parameter.grad.add_(rule.offset[name])


def train_local(
    model: MLLM,
    steps: Iterable[Sequence[Sequence[Encoded]]],
    received: Tensors,
    rule: LocalRule,
    settings: LocalSettings,
    seed: int,
) -> LocalResult:
    """Train the adapter from `received` through `steps`, each a list of micro-batches whose gradients add up.

    `seed` is for dropout alone; the global generator is left as it was. A step's gradient is the mean over its samples.
    Raises ValueError where the rule leaves nothing to train.
    """
    adapter, device = model.adapter, model.backbone.device
    adapter.set(received)
    trainable = {name: p for name, p in adapter.parameters.items() if rule.trainable(name)}
    if not trainable:
        raise ValueError("the algorithm's rule leaves no tensor to train")
    start = {name: p.detach().clone() for name, p in adapter.parameters.items()}
    if rule.offset is not None:
        rule = replace(rule, offset=adapter.pad(rule.offset))
    observed = {name: torch.zeros_like(p) for name, p in trainable.items()} if rule.observe_gradient else None
    # Kept as tensors: reading a number from a GPU would wait for it at every step.
    total_loss = torch.zeros((), device=device)
    examples = taken = 0
    for name, parameter in adapter.parameters.items():
        parameter.requires_grad_(name in trainable)
    optimizer = _optimizer(list(trainable.values()), settings)
    model.model.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for step in steps:
                samples = sum(len(batch) for batch in step)
                optimizer.zero_grad(set_to_none=True)
                for batch in step:
                    loss = model.loss(batch)
                    if loss.requires_grad:  # not where the adapter is on the vision tower and no sample has a picture
                        (loss / samples).backward()  # type: ignore[no-untyped-call]
                    total_loss += loss.detach()
                if observed is not None:
                    _accumulate(observed, trainable)
                apply_rule(trainable, rule, start)
                if settings.clip:
                    nn.utils.clip_grad_norm_(trainable.values(), settings.clip)
                optimizer.step()
                examples += samples
                taken += 1
    finally:
        model.model.eval()
        for parameter in adapter.parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
    mean = adapter.crop({name: total / max(taken, 1) for name, total in observed.items()}) if observed is not None else None
    return LocalResult(
        received=received,
        trained=adapter.get(),
        mean_gradient=mean,
        examples=examples,
        steps=taken,
        lr=settings.lr,
        metrics={"loss": float(total_loss) / max(examples, 1)},
        momentum=settings.momentum if settings.optimizer == "sgd" else 0.0,
    )


@torch.no_grad()
def _accumulate(observed: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            observed[name].add_(parameter.grad)
