"""The fold: a low-rank change of the frozen base weights that some algorithms send in addition to a LoRA adapter.

A fold replaces the previous one and is never added to it. Setting it twice therefore changes nothing, and a client that
missed rounds needs only the latest fold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedmllm.algorithms.factors import FOLD, FOLD_A, FOLD_B, A, B, modules, with_rank
from fedmllm.tensors import Tensors


def dense_change(module: str, fold: Tensors, device: torch.device) -> Tensor:
    """The change of the module's weight: (d_out, d_in)."""
    if module + FOLD in fold:
        return fold[module + FOLD].to(device)
    return fold[module + FOLD_B].to(device) @ fold[module + FOLD_A].to(device)


def branch_hook(module: str, fold: Tensors, device: torch.device) -> Any:
    """A forward hook that adds the fold's output to the output of a linear layer."""
    names = (FOLD,) if module + FOLD in fold else (FOLD_A, FOLD_B)
    weights = [fold[module + name].to(device) for name in names]

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].float()
        for weight in weights:
            x = nn.functional.linear(x, weight)
        return output + x.to(output.dtype)

    return add


def factors_with_fold(adapter: Tensors, fold: Tensors, scale: float) -> Tensors:
    """LoRA factors of s B A + fold with scale 1, where s is `scale`. All get the largest rank that any of them needs."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for m in modules(adapter):
        right, left = adapter[m + A], adapter[m + B] * scale
        if m + FOLD in fold:
            change = fold[m + FOLD]
            d_out, d_in = change.shape
            # The change times an identity is exact, with the smallest rank that suffices for every matrix of this shape.
            extra = (torch.eye(d_out), change) if d_out <= d_in else (change, torch.eye(d_in))
            right, left = torch.cat((right, extra[1])), torch.cat((left, extra[0]), dim=1)
        elif m + FOLD_A in fold:
            right, left = torch.cat((right, fold[m + FOLD_A])), torch.cat((left, fold[m + FOLD_B]), dim=1)
        factors[m] = (right, left)
    rank = max(right.shape[0] for right, _ in factors.values())
    padded: Tensors = {}
    for m, (right, left) in factors.items():
        padded |= with_rank(m, right, left, rank)
    return padded
