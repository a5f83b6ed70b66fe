"""Small makers that the tests of the pure modules share."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from hypothesis import settings
from PIL import Image

from fedmllm.algorithms import (
    AdapterInfo,
    Algorithm,
    ClientInfo,
    LocalResult,
    LocalRule,
    RoundInfo,
    Update,
    algorithms,
    complete,
    compressions,
    regularizations,
)
from fedmllm.data.loading import read_split, usable_samples
from fedmllm.data.samples import Loaded, Problem, Sample, Split, Task
from fedmllm.rng import stream
from fedmllm.tensors import State, Tensors, flatten

# Derandomised, so that a green suite stays green; without a deadline, so that a busy machine does not matter.
quick = settings(max_examples=40, deadline=None, derandomize=True)

COMBINATIONS = [(*pair, "none") for pair in product(algorithms.names(), regularizations.names())] + [
    (name, "none", compression)
    for name, compression in product(algorithms.names(), compressions.names())
    if compression != "none"
]
"""(algorithm, regularisation, compression): every algorithm in every wrapper."""


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


def load_samples(
    task: Task,
    split: Split,
    on_bad_sample: Literal["error", "skip"],
    choose: Callable[[list[Sample]], list[Sample]] = lambda samples: samples,
) -> Loaded:
    """The samples and problems of a split. Raises DataError as a run would."""
    loaded = read_split(task, split, choose)
    usable_samples(loaded, task, split, on_bad_sample)
    return loaded


def tensors(**values: Any) -> Tensors:
    return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in values.items()}


def same(a: State, b: State) -> bool:
    """Bit for bit, names included."""
    x, y = flatten(a), flatten(b)
    return x.keys() == y.keys() and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)


def lora_adapter(layers: int = 6, rank: int = 2) -> Tensors:
    """An adapter under the names that PEFT gives: A random, B zero, as LoRA starts; d_in = 3, d_out = 4."""
    rng, adapter = stream(0, "lora_adapter"), {}
    for layer in range(layers):
        module = f"base_model.model.model.text_model.layers.{layer}.self_attn.q_proj"
        adapter[f"{module}.lora_A.weight"] = torch.tensor(rng.normal(size=(rank, 3)), dtype=torch.float32)
        adapter[f"{module}.lora_B.weight"] = torch.zeros(4, rank)
    return adapter


ADAPTER_INFO = AdapterInfo(layers=6, layer={name: int(name.split(".")[5]) for name in lora_adapter()}, alpha=3.0)


def round_info(
    round: int = 0,
    sampled: Sequence[int] = (0, 1, 2),
    rounds: int = 3,
    clients: int = 5,
    client: ClientInfo | None = None,
    ranks: Mapping[int, int] | None = None,
) -> RoundInfo:
    return RoundInfo(round, rounds, clients, tuple(sampled), 0, ADAPTER_INFO, ranks or {}, client)


def update(client: int, adapter: Tensors, examples: int = 1, steps: int = 1, **groups: Tensors) -> Update:
    return Update(client, {"adapter": adapter, **groups}, examples, steps)


def built(name: str, regularization: str = "none", compression: str = "none", **options: Any) -> Algorithm:
    """The algorithm inside its wrappers, all with their defaults."""
    algorithm = regularizations.build(regularization, {})(algorithms.build(name, options))
    # What is remembered of one round cannot be added in the next where the factors are made anew between them.
    settings = {"feedback": False} if compression == "top-k" and algorithm.refactors else {}
    return compressions.build(compression, settings)(algorithm)


def target(client: int, name: str, shape: Sequence[int]) -> torch.Tensor:
    """Where the made-up client's loss ½ ‖w − target‖² is least."""
    return torch.tensor(stream(7, "target", client, name).normal(size=tuple(shape)), dtype=torch.float32)


def steps_of(client: int) -> int:
    return 2 + client % 3


def examples_of(client: int) -> int:
    return 10 * (client + 1)


LR = 0.1


def local_sgd(client: int, start: Tensors, rule: LocalRule) -> LocalResult:
    """Plain gradient descent on the made-up loss under a rule, as a client would train."""
    w = {name: tensor.clone() for name, tensor in start.items()}
    seen = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    for _ in range(steps_of(client)):
        for name in (n for n in w if rule.trainable(n)):
            g = w[name] - target(client, name, w[name].shape)
            seen[name] += g / steps_of(client)
            g = g + rule.proximal.get(name, 0.0) * (w[name] - start[name])
            if rule.offset is not None and name in rule.offset:
                g = g + rule.offset[name]
            w[name] = w[name] - LR * g
    mean = seen if rule.observe_gradient else None
    return LocalResult(start, w, mean, examples_of(client), steps_of(client), LR, {"loss": float(client)})


def pretend_to_train(
    algorithm: Algorithm, client: int, message: State, memory: State, info: RoundInfo, initial: Tensors | None = None
) -> tuple[Update, State]:
    """A client's round as a fleet does it, on the made-up loss; (its update, its new memory)."""
    info = replace(info, client=ClientInfo(client, gap=0.25 * (client % 4)))
    received = complete(message, memory, initial or lora_adapter())
    result = local_sgd(client, received["adapter"], algorithm.rule(received, memory, info))
    upload, remembered = algorithm.finish(result, received, memory, info)
    return Update(client, upload, result.examples, result.steps, result.metrics), remembered


class FakeFleet:
    """Clients with made-up losses and a real memory; `spoil` may replace a round's honest updates."""

    def __init__(self, algorithm: Algorithm, spoil: Callable[[int, list[Update]], list[Update]] | None = None) -> None:
        self.algorithm, self.spoil = algorithm, spoil or (lambda _, updates: updates)
        self.memory: dict[int, State] = {}
        self.before: dict[int, State] = {}
        self.seen: list[tuple[RoundInfo, Mapping[int, State]]] = []
        self.committed: list[int] = []

    def train(self, info: RoundInfo, messages: Mapping[int, State]) -> Sequence[Update]:
        self.seen.append((info, messages))
        updates = []
        for client in info.sampled:
            memory = self.before[client] = self.memory.get(client, {})
            one, self.memory[client] = pretend_to_train(self.algorithm, client, messages[client], memory, info)
            updates.append(one)
        return self.spoil(info.round, updates)

    def forget(self, round: int, clients: Sequence[int]) -> None:
        for client in clients:
            self.memory[client] = self.before[client]

    def commit(self, round: int) -> None:
        self.committed.append(round)

    def personal(self, client: int, message: State, done: int) -> Tensors:
        return complete(message, self.memory.get(client, {}), lora_adapter())["adapter"]


CLIENTS = (0, 1, 3)


def a_round(
    algorithm: Algorithm, state: State, memories: dict[int, State], info: RoundInfo, initial: Tensors | None = None
) -> list[Update]:
    """The updates of a round of pretended training; `memories` is brought up to date."""
    updates = []
    for client in info.sampled:
        message = algorithm.message(state, client, info)
        one, memories[client] = pretend_to_train(algorithm, client, message, memories.get(client, {}), info, initial)
        updates.append(one)
    return updates


def rounds_of(
    algorithm: Algorithm,
    rounds: int = 4,
    adapter: Tensors | None = None,
    sampled: Callable[[int], Sequence[int]] = lambda number: CLIENTS,
    ranks: Mapping[int, int] | None = None,
) -> Iterator[tuple[State, list[Update], State, RoundInfo]]:
    """(state before, updates, state after, info) of each round."""
    start = adapter or lora_adapter()
    memories: dict[int, State] = {}
    state = algorithm.init(start)
    for number in range(rounds):
        info = round_info(number, sampled(number), rounds, ranks=ranks)
        updates = a_round(algorithm, state, memories, info, start)
        after = algorithm.aggregate(state, updates, info)
        yield state, updates, after, info
        state = after
