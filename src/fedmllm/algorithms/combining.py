"""What the server may do between screening updates and aggregating them: replace them, with a robust estimate of their mean or
with a noisy one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedmllm.algorithms.base import Algorithm, RoundInfo, Update
from fedmllm.registry import Registry
from fedmllm.tensors import State


@dataclass(frozen=True)
class Combined:
    """The updates that the algorithm aggregates in place of those that arrived.

    `kept[client]` is the share of the client's update that still counts, from 0 to 1; it is empty if the combiner does not
    choose among updates. `privacy` has the privacy figures of the round. `state` has groups of the server's state that belong
    to the combiner; they are stored with the algorithm's and never sent.
    """

    updates: Sequence[Update]
    kept: Mapping[int, float] = field(default_factory=dict)
    privacy: Mapping[str, float] = field(default_factory=dict)
    state: State = field(default_factory=dict)


class Combiner(Protocol):
    """Replaces the valid updates of a round, sorted by client, before they are aggregated. A pure function."""

    def __call__(self, updates: Sequence[Update], algorithm: Algorithm, state: State, info: RoundInfo) -> Combined: ...


@dataclass(frozen=True)
class Robust:
    """A robust aggregation: its combiner, and what must hold of the experiment.

    A round needs `least` updates for the method to promise anything; if it cannot have as many, `instead` is the advice. With
    `mean_only` the algorithm receives copies of one estimate instead of single updates. With `remembers` the combiner uses its
    state of the round before, whose entries must mean the same in this round. With `products` it multiplies LoRA's factors.
    """

    combine: Combiner
    least: int = 1
    instead: str = ""
    mean_only: bool = True
    remembers: bool = False
    products: bool = False


robusts: Registry[Robust | None] = Registry("robust", "fedmllm.algorithms.robust")


@robusts.register("none")
def no_robust() -> None:
    """The algorithm's own mean, which a single client can move as far as it likes."""


def as_upload(change: State, received: State, shapes: State) -> State:
    """A change in the form of an upload: the received adapter plus the change; other groups are changes already."""
    upload: State = {}
    for group, tensors in change.items():
        start = received.get("adapter", {}) if group == "adapter" else {}
        upload[group] = {
            name: (tensor + start[name].double() if name in start else tensor).to(shapes[group][name].dtype)
            for name, tensor in tensors.items()
        }
    return upload
