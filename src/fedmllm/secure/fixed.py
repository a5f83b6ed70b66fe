"""Updates as vectors of integers whose sum modulo 2^b is their sum.

A client k of weight n_k sends for each number x of its update

    q_k = round(n_k / W · x / clip · Q),   |x| ≤ clip,   n_k ≤ W,   Q = ⌊(2^(b−1) − 1) / K⌋

with K the clients sampled, so |Σ q_k| ≤ K Q < 2^(b−1): the sum never wraps, whatever clients hold. The server has the weighted
mean Σ n_k x_k / Σ n_k = Σ q_k · W clip / (Q Σ n_k), wrong by at most ½ a unit a client:

    |error| ≤ K W clip / (2 Q Σ n_k)

The sums of examples, steps, clipped numbers and metrics stand before it in 64 bits of their own and are as hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmllm.algorithms import Update
from fedmllm.secure.settings import Pairwise
from fedmllm.tensors import State, Tensors

COUNTS = ("examples", "steps", "clipped")
METRICS = ("loss", "padding")
"""What clients report; each is summed times the client's examples. Others do not travel."""
_METRIC_UNIT = 2.0**-20
_METRIC_CLIP = 1000.0
_HEAD = 8 * (len(COUNTS) + len(METRICS))
_FEWEST_LEVELS = 1000
_PIECE = 1 << 14
Vector = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FixedPoint:
    """`clients` are those sampled; `weight` is the most that one may weigh, 1 where all weigh the same.

    Raises ValueError where a sum could not be told from others, or would be too coarse to be of use.
    """

    clients: int
    clip: float
    bits: int
    max_examples: int
    uniform: bool

    def __post_init__(self) -> None:
        if self.levels < _FEWEST_LEVELS:
            raise ValueError(
                f"secure.bits = {self.bits} leaves only {self.levels} steps between 0 and secure.clip where "
                f"{self.clients} clients are summed; raise it"
            )
        if self.clients * self.max_examples > 1 << 33:
            raise ValueError(
                f"secure.max_examples = {self.max_examples} is too large where {self.clients} clients are summed; lower it"
            )

    @classmethod
    def of(cls, settings: Pairwise, clients: int, averages: str) -> FixedPoint:
        return cls(clients, settings.clip, settings.bits, settings.max_examples, averages == "uniform")

    @cached_property
    def levels(self) -> int:
        """Q; at most 2^48, so that what float64 rounds on the way is far below ½."""
        return int(min(((1 << (self.bits - 1)) - 1) // self.clients, 1 << 48))

    @property
    def _most(self) -> int:
        return 1 if self.uniform else self.max_examples

    @property
    def unit(self) -> float:
        """What 1 in a sum is worth, before it is divided by the sum of the weights."""
        return self._most * self.clip / self.levels

    def error(self, weights: Sequence[float]) -> float:
        """How far the mean of clients of these weights can be from the true one in any number, rounding of float32 aside."""
        return 0.5 * len(weights) * self.unit / sum(weights)

    def nbytes(self, numbers: int) -> int:
        return _HEAD + numbers * self.bits // 8

    def encode(self, change: State, update: Update) -> Vector:
        """The update as bytes of integers: the counts, then the numbers of `change` in the order of their names.

        Raises ValueError, without a number in it, for an update that must not be summed.
        """
        if update.examples < 1 or update.steps < 1:
            raise ValueError("no examples")
        if update.examples > self.max_examples:
            raise ValueError(f"holds more samples than secure.max_examples = {self.max_examples} allows; raise it")
        flat = _flat(change)
        if not bool(torch.isfinite(flat).all()):
            raise ValueError("NaN or infinity in the update")
        weight = 1 if self.uniform else update.examples
        clipped = int((flat.abs() > self.clip).sum())
        scaled = flat.clamp_(-self.clip, self.clip).mul_(weight / self.unit).round_().to(torch.int64)
        metrics = (_whole(float(update.metrics.get(name, 0.0))) * update.examples for name in METRICS)
        head = np.array([update.examples, update.steps, clipped, *metrics], dtype="<i8")
        return np.concatenate([head.view(np.uint8), scaled.numpy().astype(f"<i{self.bits // 8}").view(np.uint8)])

    def words(self, content: Vector) -> tuple[Vector, Vector]:
        """The two parts of such bytes as unsigned integers, to add and subtract in place; both wrap around."""
        return content[:_HEAD].view("<u8"), content[_HEAD:].view(f"<u{self.bits // 8}")

    def add(self, total: Vector, other: Vector) -> None:
        """total ← total + other, modulo 2^64 and 2^bits."""
        for left, right in zip(self.words(total), self.words(other), strict=True):
            np.add(left, right, out=left)

    def add_mask(self, total: Vector, stream: Callable[[int], bytes], sign: int) -> None:
        """total ← total ± the next bytes of the stream, a piece that fits the processor's cache at a time."""
        for part in self.words(total):
            for start in range(0, len(part), _PIECE):
                piece = part[start : start + _PIECE]
                noise = np.frombuffer(stream(piece.nbytes), dtype=piece.dtype)
                (np.add if sign > 0 else np.subtract)(piece, noise, out=piece)

    def decode(self, total: Vector, shapes: State, clients: int) -> tuple[State, dict[str, float]]:
        """(the weighted mean of the changes, the sums of the counts and the weighted means of the metrics).

        Raises ValueError where this cannot be a sum of what honest clients send.
        """
        head, body = (part.view(part.dtype.str.replace("u", "i")) for part in self.words(total))
        counts = dict(zip(COUNTS, (float(count) for count in head), strict=False))
        if not clients <= counts["examples"] <= clients * self.max_examples:
            raise ValueError("the sum of the masked updates is none of honest clients")
        weight = clients if self.uniform else counts["examples"]
        told = {
            name: float(value) * _METRIC_UNIT / counts["examples"]
            for name, value in zip(METRICS, head[len(COUNTS) :], strict=True)
        }
        mean = torch.from_numpy(body.astype(np.float64)) * (self.unit / weight)
        return _unflat(mean, shapes), counts | told


def size(shapes: State) -> int:
    """How many numbers an update of these shapes has."""
    return sum(tensor.numel() for tensors in shapes.values() for tensor in tensors.values())


def _whole(value: float) -> int:
    return round(max(-_METRIC_CLIP, min(_METRIC_CLIP, value)) / _METRIC_UNIT) if np.isfinite(value) else 0


def _ordered(state: Mapping[str, Tensors]) -> list[tuple[str, str]]:
    return [(group, name) for group in sorted(state) for name in sorted(state[group])]


def _flat(state: State) -> Tensor:
    return torch.cat([state[group][name].detach().to("cpu", torch.float64).flatten() for group, name in _ordered(state)])


def _unflat(flat: Tensor, shapes: State) -> State:
    places = _ordered(shapes)
    pieces = torch.split(flat, [shapes[group][name].numel() for group, name in places])
    state: State = {group: {} for group in shapes}
    for (group, name), piece in zip(places, pieces, strict=True):
        state[group][name] = piece.view(shapes[group][name].shape)
    return state


__all__ = ["COUNTS", "METRICS", "FixedPoint", "Vector", "size"]
