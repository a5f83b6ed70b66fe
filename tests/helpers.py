"""Small makers that the tests of the pure modules share."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from hypothesis import settings
from PIL import Image

from fedmllm import config
from fedmllm.algorithms import Algorithm, Update, algorithms, compressions, regularizations
from fedmllm.algorithms.toy_federation import (
    ADAPTER_INFO,
    CLIENTS,
    LR,
    examples_of,
    local_sgd,
    lora_adapter,
    round_info,
    same,
    steps_of,
    target,
)
from fedmllm.algorithms.toy_federation import ToyFleet as FakeFleet
from fedmllm.algorithms.toy_federation import run_rounds as rounds_of
from fedmllm.algorithms.toy_federation import train_round as a_round
from fedmllm.data.loading import read_split, usable_samples
from fedmllm.data.samples import Loaded, Problem, Sample, Split, Task
from fedmllm.experiment.parts import options_of
from fedmllm.tensors import Tensors

__all__ = [
    "ADAPTER_INFO",
    "CLIENTS",
    "COMBINATIONS",
    "IN_TURN",
    "LR",
    "FakeFleet",
    "a_round",
    "built",
    "examples_of",
    "load_samples",
    "local_sgd",
    "lora_adapter",
    "mixed",
    "png",
    "quick",
    "round_info",
    "rounds_of",
    "same",
    "sample",
    "steps_of",
    "target",
    "task",
    "tensors",
    "update",
]  # fmt: skip

# Derandomised, so that a green suite stays green; without a deadline, so that a busy machine does not matter.
quick = settings(max_examples=40, deadline=None, derandomize=True)

COMBINATIONS = [(*pair, "none") for pair in product(algorithms.names(), regularizations.names())] + [
    (name, "none", compression)
    for name, compression in product(algorithms.names(), compressions.names())
    if compression != "none" and not algorithms.build(name, {}).packed
]
"""(algorithm, regularisation, compression): every algorithm in every wrapper that takes it."""


def _in_turn() -> list[tuple[str, ...]]:
    chosen: list[tuple[str, ...]] = []
    for number, name in enumerate(algorithms.names()):
        alone, wrapped = (name, "none", "none"), [c for c in COMBINATIONS if c[0] == name and set(c[1:]) != {"none"}]
        chosen += [alone, wrapped[number % len(wrapped)]]
    return chosen


IN_TURN = _in_turn()
"""Every algorithm alone and in one wrapper, each wrapper in its turn: for tests that take too long for all combinations."""


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


def update(client: int, adapter: Tensors, examples: int = 1, steps: int = 1, **groups: Tensors) -> Update:
    return Update(client, {"adapter": adapter, **groups}, examples, steps)


def built(name: str, regularization: str = "none", compression: str = "none", **options: Any) -> Algorithm:
    """The algorithm inside its wrappers, all with their defaults."""
    algorithm = regularizations.build(regularization, {})(algorithms.build(name, options))
    # What is remembered of one round cannot be added in the next where the factors are made anew between them.
    settings = {"feedback": False} if compression == "top-k" and algorithm.refactors else {}
    return compressions.build(compression, settings)(algorithm)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings of a file with overrides in the notation of `--set`, and the notes about dropped options."""
    return config.apply_settings(raw, [config.parse_override(override) for override in overrides], options_of)


HETEROGENEITY = """
[[axes]]
name = "heterogeneity"
cells = [
    { name = "α = 0.5", set = { "scenario.name" = "aligned", "partition.alpha" = 0.5 } },
    { name = "β = 0.3", set = { "scenario.name" = "missing", "scenario.rate" = 0.3 } },
]
"""
"""An axis of a sweep: two settings of the data."""
