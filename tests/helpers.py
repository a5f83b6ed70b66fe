"""Small makers that the tests of the pure modules share."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from PIL import Image

from fedmllm.algorithms import Algorithm, LocalResult, RoundInfo, Update, algorithms, regularizations
from fedmllm.data.samples import Problem, Sample, Task
from fedmllm.rng import stream
from fedmllm.tensors import State, Tensors, add, flatten

# Derandomised, so that a green suite stays green; without a deadline, so that a busy machine does not matter.
quick = settings(max_examples=40, deadline=None, derandomize=True)

COMBINATIONS = list(product(algorithms.names(), regularizations.names()))
"""(algorithm, regularisation), all there are."""


def png(color: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def sample(id: str = "s", kind: str = "both", **fields: Any) -> Sample:
    """A sample with the modalities of `kind`: both, image, text or none."""
    image = Path("p.png") if kind in ("both", "image") else None
    text = "a text" if kind in ("both", "text") else None
    return replace(Sample(id, "what is it?", "yes", image=image, text=text), **fields)


def mixed(count: int) -> list[Sample]:
    """Samples of all kinds, three labels and four sources, in the order of their ids."""
    kinds = ("both", "image", "text", "both", "none")
    return [sample(f"s{i:03d}", kinds[i % 5], label=f"l{i % 3}", source=f"o{i % 4}") for i in range(count)]


def task(*entries: Sample | Problem) -> Task:
    return Task("fake", "accuracy", lambda split: entries)


def tensors(**values: Any) -> Tensors:
    return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in values.items()}


def same(a: State, b: State) -> bool:
    """Bit for bit, names included."""
    x, y = flatten(a), flatten(b)
    return x.keys() == y.keys() and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)


def round_info(round: int = 0, sampled: Sequence[int] = (0, 1, 2), rounds: int = 3, clients: int = 5) -> RoundInfo:
    return RoundInfo(round, rounds, clients, tuple(sampled), seed=0)


def update(client: int, adapter: Tensors, examples: int = 1, steps: int = 1, **metrics: float) -> Update:
    return Update(client, {"adapter": adapter}, examples, steps, metrics)


def built(name: str, regularization: str = "none") -> Algorithm:
    return regularizations.build(regularization, {})(algorithms.build(name, {}))


def lora_adapter(layers: int = 6) -> Tensors:
    """A rank-2 adapter under the names that PEFT gives: A random, B zero, as LoRA starts."""
    rng, adapter = stream(0, "lora_adapter"), {}
    for layer in range(layers):
        module = f"base_model.model.model.text_model.layers.{layer}.self_attn.q_proj"
        adapter[f"{module}.lora_A.weight"] = torch.tensor(rng.normal(size=(2, 3)), dtype=torch.float32)
        adapter[f"{module}.lora_B.weight"] = torch.zeros(4, 2)
    return adapter


def pretend_to_train(
    algorithm: Algorithm, client: int, received: State, memory: State, info: RoundInfo
) -> tuple[Update, State]:
    """A client's round with made-up gradients that are a function of client and round; (its update, its new memory)."""
    rule = algorithm.rule(received, memory, info)
    rng = stream(7, "gradient", client, info.round)
    adapter = received["adapter"]
    made_up = {name: torch.tensor(rng.normal(size=tuple(t.shape)), dtype=torch.float32) for name, t in adapter.items()}
    step = {name: g * (0.1 if rule.trainable(name) else 0.0) for name, g in made_up.items()}
    mean = made_up if rule.observe_gradient else None
    result = LocalResult(adapter, add(adapter, step), mean, 10 * (client + 1), 4 + client, 0.1, {"loss": float(client)})
    upload, remembered = algorithm.finish(result, received, memory, info)
    return Update(client, upload, result.examples, result.steps, result.metrics), remembered


class FakeFleet:
    """Clients with made-up gradients and a real memory; `spoil` may replace a round's honest updates."""

    def __init__(self, algorithm: Algorithm, spoil: Callable[[int, list[Update]], list[Update]] | None = None) -> None:
        self.algorithm, self.spoil = algorithm, spoil or (lambda _, updates: updates)
        self.memory: dict[int, State] = {}
        self.seen: list[tuple[RoundInfo, State, float]] = []
        self.committed: list[int] = []

    def train(self, info: RoundInfo, received: State, lr: float) -> Sequence[Update]:
        self.seen.append((info, received, lr))
        updates = []
        for client in info.sampled:
            one, self.memory[client] = pretend_to_train(self.algorithm, client, received, self.memory.get(client, {}), info)
            updates.append(one)
        return self.spoil(info.round, updates)

    def commit(self, round: int) -> None:
        self.committed.append(round)
