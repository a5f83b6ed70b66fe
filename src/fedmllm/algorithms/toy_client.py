"""A client on a toy problem: it runs an algorithm's client half without a model or data.

Client k minimises ½ ‖w − target_k‖² by plain gradient descent, under the algorithm's rule. `traffic` and the checks in
`fedmllm.testing` observe algorithms with it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from fedmllm.algorithms.base import Algorithm, ClientInfo, LocalResult, LocalRule, RoundInfo, Update, complete
from fedmllm.rng import stream
from fedmllm.tensors import State, Tensors, clone, zeros_like

LR = 0.1


@lru_cache(maxsize=4096)
def target(client: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The minimum of the client's loss for this tensor. Shared between calls, so it must not be modified."""
    return torch.tensor(stream(7, "target", client, name).normal(size=shape), dtype=torch.float32)


def steps_of(client: int) -> int:
    return 2 + client % 3


def examples_of(client: int) -> int:
    return 10 * (client + 1)


def loss_of(client: int, w: Tensors) -> float:
    return sum(0.5 * float((t - target(client, name, tuple(t.shape))).square().sum()) for name, t in w.items())


def local_sgd(client: int, received: Tensors, rule: LocalRule, lr: float = LR) -> LocalResult:
    """Train with plain gradient descent under a rule, and report what local training on a model reports."""
    w, gradients, losses = clone(received), zeros_like(received), []
    for _ in range(steps_of(client)):
        losses.append(loss_of(client, w))
        for name in (n for n in w if rule.trainable(n)):
            g = w[name] - target(client, name, tuple(w[name].shape))
            gradients[name] += g / steps_of(client)
            g = g + rule.proximal.get(name, 0.0) * (w[name] - received[name])
            if rule.offset is not None and name in rule.offset:
                g = g + rule.offset[name]
            w[name] = w[name] - lr * g
    return LocalResult(
        received=received,
        trained=w,
        mean_gradient=gradients if rule.observe_gradient else None,
        examples=examples_of(client),
        steps=steps_of(client),
        lr=lr,
        metrics={"loss": sum(losses) / len(losses), "padding": 0.0},
        loss_before=losses[0] if rule.observe_loss else None,
    )


def train_toy_client(
    algorithm: Algorithm, client: int, message: State, memory: State, info: RoundInfo, initial: Tensors
) -> tuple[Update, State]:
    """A client's round: (its update, its new memory). A fleet does the same with a model."""
    info = replace(info, client=ClientInfo(client, gap=0.25 * (client % 4)))
    received = complete(message, memory, initial)
    result = local_sgd(client, received["adapter"], algorithm.rule(received, memory, info), info.lr)
    upload, new_memory = algorithm.finish(result, received, memory, info)
    return Update(client, upload, result.examples, result.steps, result.metrics), new_memory
