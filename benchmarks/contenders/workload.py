"""What all contenders do: the same samples in the same order, the same optimizer, the same adapter to start from.

Plain texts, picture files and lists of indices, so that contenders other than ours need nothing of the package, nor its
memory. `making` makes it.
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
LR, BETAS, EPS, CLIP = 3e-3, (0.9, 0.95), 1e-8, 1.0
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Size:
    """`samples` of each client, a multiple of 4 so that every step has as many; `questions` to evaluate on.

    `cohort` is `train.cohort` of the contender that has cohorts.
    """

    rounds: int
    clients: int
    samples: int
    questions: int
    cohort: int | str = "auto"
    model: str = "pocket"


@dataclass(frozen=True)
class Item:
    """`prompt` as the chat template writes it, `answer` with its end mark, `image` a file, `truth` the bare answer."""

    prompt: str
    answer: str
    image: str
    truth: str


@dataclass(frozen=True)
class Outcome:
    """What a contender reached and what it took. `prepare_seconds` is work done once before the rounds, whose fruits the
    rounds use; `startup_seconds` is the start of a runtime. Neither is part of `train_seconds`. `cohort` is how many clients
    trained in one pass."""

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
    """`steps[round][client]` is a list of optimizer steps, each a list of places in `train`."""

    size: Size
    model: str
    target: str
    train: list[Item]
    test: list[Item]
    steps: list[list[list[list[int]]]]
    initial: Tensors

    def order(self, number: int, client: int) -> list[Item]:
        """A client's samples in one round, in the order they are trained on."""
        return [self.train[i] for step in self.steps[number][client] for i in step]

    def save(self, folder: Path) -> None:
        save_file(self.initial, folder / "initial.safetensors")
        plain = {
            "size": asdict(self.size), "model": self.model, "target": self.target, "steps": self.steps,
            "train": [asdict(item) for item in self.train], "test": [asdict(item) for item in self.test],
        }  # fmt: skip
        (folder / "workload.json").write_text(json.dumps(plain))

    @classmethod
    def load(cls, folder: Path) -> Workload:
        plain = json.loads((folder / "workload.json").read_text())
        plain["size"] = Size(**plain["size"])
        for part in ("train", "test"):
            plain[part] = [Item(**item) for item in plain[part]]
        return cls(initial=load_file(folder / "initial.safetensors"), **plain)


def average(adapters: list[Tensors], weights: list[int]) -> Tensors:
    """FedAvg: the mean weighted by samples."""
    total = sum(weights)
    return {name: sum(a[name] * (w / total) for a, w in zip(adapters, weights, strict=True)) for name in adapters[0]}


def peak_memory_mb() -> int:
    """The process's largest resident size."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
