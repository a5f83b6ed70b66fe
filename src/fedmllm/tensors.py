"""Named tensors, and named groups of them: the one representation of everything that is trained, sent or saved.

`Tensors` holds an adapter, a gradient offset or a momentum. `State` holds several of them under group names (`adapter`,
`control`, `fold`, `m`, `v`, …); the same type is the message, the server state, the client memory and the checkpoint. The
functions in this module are pure: they return new dictionaries and never modify their inputs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
State = dict[str, Tensors]

_SEPARATOR = "/"


def _same_names(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    if a.keys() != b.keys():
        unmatched = sorted(a.keys() ^ b.keys())
        raise ValueError(f"tensors differ in {len(unmatched)} names, the first is {unmatched[0]!r}")


def add(a: Tensors, b: Tensors) -> Tensors:
    """a + b for each name. Raises ValueError unless both have the same names."""
    _same_names(a, b)
    return {name: a[name] + b[name] for name in a}


def subtract(a: Tensors, b: Tensors) -> Tensors:
    """a − b for each name. Raises ValueError unless both have the same names."""
    _same_names(a, b)
    return {name: a[name] - b[name] for name in a}


def scale(a: Tensors, factor: float) -> Tensors:
    return {name: tensor * factor for name, tensor in a.items()}


def zeros_like(a: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in a.items()}


def clone(a: Tensors) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in a.items()}


def weighted_mean(items: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """Σ wᵢ xᵢ / Σ wᵢ, summed in float64 and returned in each tensor's own dtype.

    Raises ValueError if there is nothing to average, if names differ, or if the weights do not sum to a positive number.
    """
    if not items or len(items) != len(weights):
        raise ValueError(f"{len(items)} items and {len(weights)} weights: the numbers must be equal and at least one")
    total = float(sum(weights))
    if not total > 0:
        raise ValueError(f"weights must sum to a positive number, not {total}")
    for other in items[1:]:
        _same_names(items[0], other)
    mean: Tensors = {}
    for name, first in items[0].items():
        accumulated = torch.zeros_like(first, dtype=torch.float64)
        for item, weight in zip(items, weights, strict=True):
            accumulated += item[name].to(torch.float64) * (weight / total)
        mean[name] = accumulated.to(first.dtype)
    return mean


def norm(a: Tensors) -> float:
    """The Euclidean norm over all entries, computed in float64. It does not depend on the order of the names, which files and
    messages change."""
    return math.sqrt(sum(sorted(float(t.to(torch.float64).square().sum()) for t in a.values())))


def distance(a: Tensors, b: Tensors) -> float:
    """‖a − b‖ over all entries. Raises ValueError unless both have the same names."""
    return norm(subtract(a, b))


def nbytes(a: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in a.values())


def bytes_by_group(state: State) -> dict[str, int]:
    """The size of each group in bytes."""
    return {group: nbytes(tensors) for group, tensors in state.items()}


def problem_with(candidate: Tensors, reference: Tensors) -> str | None:
    """Why `candidate` cannot replace `reference`: other names, shapes or dtypes, or NaN or infinity. None if it can."""
    for names, word in ((reference.keys() - candidate.keys(), "missing"), (candidate.keys() - reference.keys(), "unknown")):
        if names:
            return f"{word} tensor {min(names)!r}"
    for name in sorted(reference):
        if candidate[name].shape != reference[name].shape:
            return f"shape {tuple(candidate[name].shape)} of {name!r} is not {tuple(reference[name].shape)}"
        if candidate[name].dtype != reference[name].dtype:
            return f"dtype {candidate[name].dtype} of {name!r} is not {reference[name].dtype}"
        if not bool(torch.isfinite(candidate[name]).all()):
            return f"NaN or infinity in {name!r}"
    return None


def not_finite(state: State) -> str | None:
    """The first tensor that holds NaN or infinity, as "group/name"; None if there is none."""
    return next((name for name, tensor in flatten(state).items() if not bool(torch.isfinite(tensor).all())), None)


def flatten(state: State) -> Tensors:
    """{"group/name": tensor}. Empty groups are lost. Raises ValueError for a group name with a slash."""
    for group in state:
        if _SEPARATOR in group:
            raise ValueError(f"group name {group!r} contains {_SEPARATOR!r}")
    return {f"{group}{_SEPARATOR}{name}": t for group, tensors in state.items() for name, t in tensors.items()}


def unflatten(flat: Tensors) -> State:
    """The inverse of `flatten`."""
    state: State = {}
    for key, tensor in flat.items():
        group, _, name = key.partition(_SEPARATOR)
        state.setdefault(group, {})[name] = tensor
    return state


def digest(a: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in sorted order of the names."""
    sha = hashlib.sha256()
    for name in sorted(a):
        tensor = a[name].detach().cpu().contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
