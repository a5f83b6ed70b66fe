"""Updates as vectors of integers modulo 2^b, which are summed under masks.

For each number x of its update, a client k of weight n_k sends

    q_k = round(n_k / W · x / clip · Q),   |x| ≤ clip,   n_k ≤ W,   Q = ⌊(2^(b−1) − 1) / K⌋

with K sampled clients. Hence |Σ q_k| ≤ K Q < 2^(b−1): the sum never wraps around. The server computes the weighted mean
Σ n_k x_k / Σ n_k = Σ q_k · W clip / (Q Σ n_k), where each client contributes a rounding error of at most ½ unit:

    |error| ≤ K W clip / (2 Q Σ n_k)

The sums of examples, steps, clipped numbers and metrics precede the vector as 64-bit integers and are masked as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmllm.algorithms import Update
from fedmllm.secure.settings import Pairwise
from fedmllm.tensors import State, flatten, unflatten

COUNTS = ("examples", "steps", "clipped")
METRICS = ("loss", "padding")
"""The metrics that clients report; each is multiplied by the client's number of examples and summed. No others are sent."""
_METRIC_UNIT = 2.0**-20
_METRIC_CLIP = 1000.0
_HEADER = 8 * (len(COUNTS) + len(METRICS))
_MIN_LEVELS = 1000
_CHUNK = 1 << 14
Vector = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FixedPoint:
    """The encoding for a round of `clients` sampled clients. If `uniform`, all clients have weight 1.

    Raises ValueError if a sum could overflow, or would be too coarse to be useful.
    """

    clients: int
    clip: float
    bits: int
    max_examples: int
    uniform: bool

    def __post_init__(self) -> None:
        if self.levels < _MIN_LEVELS:
            raise ValueError(
                f"secure.bits = {self.bits} leaves only {self.levels} steps between 0 and secure.clip if "
                f"{self.clients} clients are summed; raise it"
            )
        if self.clients * self.max_examples > 1 << 33:
            raise ValueError(
                f"secure.max_examples = {self.max_examples} is too large if {self.clients} clients are summed; lower it"
            )

    @classmethod
    def of(cls, settings: Pairwise, clients: int, averages: str) -> FixedPoint:
        return cls(clients, settings.clip, settings.bits, settings.max_examples, averages == "uniform")

    @cached_property
    def levels(self) -> int:
        """Q; at most 2^48, so that the rounding error of float64 stays far below ½."""
        return int(min(((1 << (self.bits - 1)) - 1) // self.clients, 1 << 48))

    @property
    def unit(self) -> float:
        """The value of 1 in a sum, before the sum is divided by the sum of the weights: W clip / Q."""
        return (1 if self.uniform else self.max_examples) * self.clip / self.levels

    def error(self, weights: Sequence[float]) -> float:
        """The largest error of any number of the mean of clients of these weights, apart from the rounding of float32."""
        return 0.5 * len(weights) * self.unit / sum(weights)

    def nbytes(self, numbers: int) -> int:
        return _HEADER + numbers * self.bits // 8

    def encode(self, change: State, update: Update) -> Vector:
        """The update as the bytes of integers: the header, then the numbers of `change` in the order of their names.

        Raises ValueError for an update that must not be summed; the message contains no value of it.
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
        metrics = (_metric_integer(float(update.metrics.get(name, 0.0))) * update.examples for name in METRICS)
        header = np.array([update.examples, update.steps, clipped, *metrics], dtype="<i8")
        return np.concatenate([header.view(np.uint8), scaled.numpy().astype(f"<i{self.bits // 8}").view(np.uint8)])

    def words(self, content: Vector) -> tuple[Vector, Vector]:
        """The header and the numbers as views of unsigned integers, to add and subtract in place with wrap-around."""
        return content[:_HEADER].view("<u8"), content[_HEADER:].view(f"<u{self.bits // 8}")

    def add(self, total: Vector, other: Vector) -> None:
        """total ← total + other, modulo 2^64 and 2^bits."""
        for left, right in zip(self.words(total), self.words(other), strict=True):
            np.add(left, right, out=left)

    def add_mask(self, total: Vector, stream: Callable[[int], bytes], sign: int) -> None:
        """total ← total ± the next bytes of the stream, in chunks that fit into the processor's cache."""
        for part in self.words(total):
            for start in range(0, len(part), _CHUNK):
                chunk = part[start : start + _CHUNK]
                mask = np.frombuffer(stream(chunk.nbytes), dtype=chunk.dtype)
                (np.add if sign > 0 else np.subtract)(chunk, mask, out=chunk)

    def decode(self, total: Vector, shapes: State, clients: int) -> tuple[State, dict[str, float]]:
        """(the weighted mean of the changes, the sums of the counts with the weighted means of the metrics).

        Raises ValueError if honest clients cannot have sent vectors with this sum.
        """
        header, body = (part.view(part.dtype.str.replace("u", "i")) for part in self.words(total))
        counts = dict(zip(COUNTS, (float(count) for count in header), strict=False))
        if not clients <= counts["examples"] <= clients * self.max_examples:
            raise ValueError("the sum of the masked updates cannot come from honest clients")
        weight = clients if self.uniform else counts["examples"]
        metrics = {
            name: float(value) * _METRIC_UNIT / counts["examples"]
            for name, value in zip(METRICS, header[len(COUNTS) :], strict=True)
        }
        mean = torch.from_numpy(body.astype(np.float64)) * (self.unit / weight)
        return _unflat(mean, shapes), counts | metrics


def size(shapes: State) -> int:
    """The number of numbers in an update of these shapes."""
    return sum(tensor.numel() for tensors in shapes.values() for tensor in tensors.values())


def _metric_integer(value: float) -> int:
    return round(max(-_METRIC_CLIP, min(_METRIC_CLIP, value)) / _METRIC_UNIT) if np.isfinite(value) else 0


def _flat(state: State) -> Tensor:
    return torch.cat([tensor.detach().to("cpu", torch.float64).flatten() for _, tensor in sorted(flatten(state).items())])


def _unflat(flat: Tensor, shapes: State) -> State:
    ordered = sorted(flatten(shapes).items())
    pieces = torch.split(flat, [shape.numel() for _, shape in ordered])
    named = {name: piece.view(shape.shape) for (name, shape), piece in zip(ordered, pieces, strict=True)}
    return {group: {} for group in shapes} | unflatten(named)
