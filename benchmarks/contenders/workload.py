"""The work that all contenders do: the same samples in the same order, the same optimizer, the same initial adapter.

A workload consists of plain texts, picture files and lists of indices, so that the contenders (a) to (c) do not need to import
fedmllm, which would add to their memory. The module `experiment` builds it.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
BATCH = 4
RANK, ALPHA = 8, 16.0
LR, BETAS, EPS, CLIP = 3e-3, (0.9, 0.95), 1e-6, 1.0
"""EPS is above the rounding error of a gradient, here up to 1e-7. With AdamW's usual 1e-8, the first step of a round moves an
entry by the learning rate in the direction of its gradient even if rounding decides its sign, and a few such entries part
equal contenders by a hundredth of the trained distance."""
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Size:
    """`samples` is the number per client, a multiple of 4 so that every step has 4 samples; `questions` the number of test
    questions; `cohort` the `train.cohort` of contender (e)."""

    rounds: int
    clients: int
    samples: int
    questions: int
    cohort: int | str = "auto"
    model: str = "pocket"


@dataclass(frozen=True)
class Item:
    """`prompt` is in the chat template, `answer` includes the end token, `image` is a file, and `truth` is the bare answer."""

    prompt: str
    answer: str
    image: str
    truth: str


@dataclass(frozen=True)
class Outcome:
    """What a contender reached and how long it took.

    `prepare_seconds` is work done once before the rounds whose results they use, `startup_seconds` the start of a runtime;
    neither is part of `train_seconds`. `cohort` is the number of clients that trained in one pass.
    """

    losses: list[float]
    adapter: Tensors
    train_seconds: float
    eval_seconds: float | None
    accuracy: float | None
    threads: int
    peak_memory_mb: int
    prepare_seconds: float = 0.0
    startup_seconds: float = 0.0
    cohort: int | None = None

    def save(self, folder: Path) -> None:
        save_file({name: t.contiguous() for name, t in self.adapter.items()}, folder / "adapter.safetensors")
        (folder / "outcome.json").write_text(json.dumps({k: v for k, v in vars(self).items() if k != "adapter"}))

    @classmethod
    def load(cls, folder: Path) -> Outcome:
        return cls(adapter=load_file(folder / "adapter.safetensors"), **json.loads((folder / "outcome.json").read_text()))


@dataclass(frozen=True)
class Workload:
    """`steps[round][client]` is a list of optimizer steps, each a list of indices into `train`. `model` is a folder, `target`
    selects the modules that get LoRA, and `initial` is the adapter from which all contenders start."""

    size: Size
    model: str
    target: str
    train: list[Item]
    test: list[Item]
    steps: list[list[list[list[int]]]]
    initial: Tensors

    def order(self, number: int, client: int) -> list[Item]:
        """A client's samples in one round, in training order."""
        return [self.train[i] for step in self.steps[number][client] for i in step]

    def save(self, folder: Path) -> None:
        save_file(self.initial, folder / "initial.safetensors")
        fields = {
            "size": asdict(self.size), "model": self.model, "target": self.target, "steps": self.steps,
            "train": [asdict(item) for item in self.train], "test": [asdict(item) for item in self.test],
        }  # fmt: skip
        (folder / "workload.json").write_text(json.dumps(fields))

    @classmethod
    def load(cls, folder: Path) -> Workload:
        fields = json.loads((folder / "workload.json").read_text())
        fields["size"] = Size(**fields["size"])
        for part in ("train", "test"):
            fields[part] = [Item(**item) for item in fields[part]]
        return cls(initial=load_file(folder / "initial.safetensors"), **fields)


def average(adapters: list[Tensors], weights: list[int]) -> Tensors:
    """FedAvg: the mean of the adapters, weighted by numbers of samples."""
    total = sum(weights)
    return {name: sum(a[name] * (w / total) for a, w in zip(adapters, weights, strict=True)) for name in adapters[0]}


def peak_memory_mb() -> int:
    """The largest resident size that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
