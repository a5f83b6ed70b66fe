"""The inputs of one client's local training and the optimizer's settings. `cohort` does the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedmllm.algorithms import LocalRule
from fedmllm.config import TrainTable
from fedmllm.models.encoded import Encoded
from fedmllm.tensors import Tensors

Step = Sequence[Sequence[Encoded]]
"""One optimizer step: micro-batches whose gradients are accumulated."""


@dataclass(frozen=True)
class LocalSettings:
    """The optimizer of one client round, which starts with fresh state. `clip` is the largest gradient norm; 0 disables it."""

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

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """A fused optimizer over the parameters."""
        if self.optimizer == "sgd":
            decay, momentum = self.weight_decay, self.momentum
            return torch.optim.SGD(parameters, self.lr, momentum=momentum, weight_decay=decay, fused=True)
        return torch.optim.AdamW(parameters, self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True)


@dataclass(frozen=True)
class Work:
    """One client's training: from the adapter `received`, through `steps`, under `rule`. Only dropout uses `seed`."""

    steps: Sequence[Step]
    received: Tensors
    rule: LocalRule
    seed: int
    steps_per_pass: int | None = None
    """The number of steps that one pass over the samples takes; None if all steps are one pass."""
