"""Arithmetic on LoRA's factors A: (r, d_in) and B: (d_out, r): products, truncation, changes of rank, folds.

A module's weight is W₀ + s(r) B A. If clients have different ranks, each trains with its own s(r_k), so only the effective
changes s(r_k) B_k A_k can be compared and summed; `resized` keeps them when the rank changes. Sums are taken in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedmllm.algorithms.base import AdapterInfo, Update
from fedmllm.rng import stream
from fedmllm.tensors import State, Tensors, clone

A, B, R = ".lora_A.weight", ".lora_B.weight", ".lora_R.weight"
FOLD_A, FOLD_B, FOLD = ".fold_A", ".fold_B", ".fold"
BASIS_A, BASIS_B = ".basis_A", ".basis_B"

Factors = dict[str, tuple[Tensor, Tensor]]
"""module -> (left: (d_out, k), right: (k, d_in)), which stand for their product."""


def is_a(name: str) -> bool:
    return name.endswith(A)


def is_b(name: str) -> bool:
    return name.endswith(B)


def modules(adapter: Tensors) -> list[str]:
    """The adapted modules, sorted. Raises ValueError for tensors that are not pairs of LoRA factors."""
    names = sorted(name.removesuffix(A) for name in adapter if is_a(name))
    others = adapter.keys() - {m + suffix for m in names for suffix in (A, B)}
    if others or not names or any(m + B not in adapter for m in names):
        raise ValueError(f"not a LoRA adapter of pairs A and B: see {min(others, default='its names')!r}")
    if not_linear := [name for name, tensor in adapter.items() if tensor.dim() != 2]:
        raise ValueError(f"not a LoRA adapter of linear layers only: see {min(not_linear)!r}")
    return names


def lora_state(adapter: Tensors) -> State:
    """The initial server state of a method that keeps the adapter only. Raises ValueError unless it is a LoRA adapter."""
    modules(adapter)
    return {"adapter": clone(adapter)}


def new_lora(adapter: Tensors, seed: int, *stream_name: str | int) -> Tensors:
    """An adapter of the same shapes with B = 0 and A uniform in ±1/√d_in, as PEFT initialises it."""
    new: Tensors = {}
    for name, tensor in adapter.items():
        values = torch.zeros_like(tensor)
        if is_a(name):
            bound = tensor.shape[1] ** -0.5
            values = torch.from_numpy(stream(seed, *stream_name, name).uniform(-bound, bound, tuple(tensor.shape)))
        new[name] = values.to(tensor.dtype)
    return new


def rank_of(adapter: Tensors) -> int:
    return next(tensor.shape[0] for name, tensor in adapter.items() if is_a(name))


def half(adapter: Tensors, suffix: str) -> Tensors:
    """The tensors whose names end with `suffix`: all factors A, or all factors B."""
    return {name: tensor for name, tensor in adapter.items() if name.endswith(suffix)}


def resized(adapter: Tensors, rank: int, info: AdapterInfo) -> Tensors:
    """The adapter at another rank: the first `rank` rows of each A and columns of each B, or all of them followed by zeros.

    s(r)·B A of the rows that stay is unchanged: B is multiplied by the ratio of the scales, because the scale α / r is larger
    at a lower rank.
    """
    old = rank_of(adapter)
    if rank == old:
        return adapter
    new: Tensors = {}
    for m in modules(adapter):
        new |= with_rank(m, adapter[m + A], adapter[m + B] * (info.scale(old) / info.scale(rank)), rank)
    return new


def with_rank(module: str, a: Tensor, b: Tensor, rank: int) -> Tensors:
    """The module's factors with `rank` rows of A and columns of B: cut off, or followed by zeros."""
    return {module + A: pad(a, (0, 0, 0, rank - a.shape[0])), module + B: pad(b, (0, rank - b.shape[1]))}


def stacked(updates: Sequence[Update], weights: Sequence[float], info: AdapterInfo) -> Factors:
    """left = [s_1 B_1 …], right = [p_1 A_1; …] in float64, so that left·right = Σ p_k s(r_k) B_k A_k with Σ p_k = 1."""
    total = float(sum(weights))
    adapters = [u.groups["adapter"] for u in updates]
    return {
        m: (
            torch.cat([a[m + B].double() * info.scale(rank_of(a)) for a in adapters], dim=1),
            torch.cat([a[m + A].double() * (w / total) for a, w in zip(adapters, weights, strict=True)], dim=0),
        )
        for m in modules(adapters[0])
    }


def principal_state(weights: Mapping[str, Tensor], rank: int, scale: float) -> State:
    """The state of `AdapterInfo.principal` for the base weights (d_out, d_in) by module, in float32. Rows beyond the rank of a
    weight are zero, and the largest entry of each row of A₀ is positive."""
    adapter: Tensors = {}
    fold: Tensors = {}
    for m, weight in weights.items():
        u, sigma, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        roots = (sigma[:rank] / scale).sqrt()
        signs = _signs(vt[:rank])
        pair = with_rank(m, (roots[:, None] * vt[:rank] * signs).float(), (u[:, :rank] * roots * signs.T).float(), rank)
        pair = {name: factor.contiguous() for name, factor in pair.items()}
        adapter |= pair
        fold |= {m + FOLD_A: pair[m + A], m + FOLD_B: -scale * pair[m + B]}
    return {"adapter": adapter, "fold": fold}


def residual(ordered: Sequence[Update], weights: Sequence[float], mean: Tensors) -> Factors:
    """Factors of rank S·r, in float64, of Σ p_k B_k A_k − B̄ Ā with the means B̄ and Ā in `mean`, for equal ranks.

    Because Σ p_k (B_k − B̄) = 0, it is Σ p_k (B_k − B̄)(A_k − Ā), in which nothing cancels. With the means as they are sent, in
    float32, the error stays at the size of their rounding.
    """
    total = float(sum(weights))
    adapters = [u.groups["adapter"] for u in ordered]
    return {
        m: (
            torch.cat([a[m + B].double() - mean[m + B].double() for a in adapters], dim=1),
            torch.cat(
                [(w / total) * (a[m + A].double() - mean[m + A].double()) for a, w in zip(adapters, weights, strict=True)]
            ),
        )
        for m in modules(mean)
    }


def best_factors(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B = U_r Σ_r: (d_out, r) and A = V_rᵀ: (r, d_in) of the SVD of left·right, by QR of the two thin factors.

    The singular values are in B: the rows of A are orthonormal, so that a direction that has no weight yet still has a
    gradient. The largest entry of each row of A is positive, which fixes the signs. If the factors are thinner than `rank`,
    fewer than `rank` rows are returned.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, sigma, vt = torch.linalg.svd(r_left @ r_right.T)
    k = min(rank, sigma.numel())
    a = vt[:k] @ q_right.T
    signs = _signs(a)
    return q_left @ u[:, :k] * sigma[:k] * signs.T, a * signs


def leading_directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U: (d_out, r), Σ: (r) and Vᵀ: (r, d_in) of the largest singular values of a matrix, in its precision, by subspace
    iteration from a random start (Halko et al. 2011, 0909.4061), which draws from torch's global generator.

    The largest entry of each row of Vᵀ is positive. In float64, machines differ by less than the rounding of float32, unless
    singular values coincide.
    """
    u, sigma, v = torch.svd_lowrank(weight, q=min(rank + 8, *weight.shape), niter=4)
    vt = v[:, :rank].T
    signs = _signs(vt)
    return u[:, :rank] * signs.T, sigma[:rank], vt * signs


def _signs(rows: Tensor) -> Tensor:
    """(rows, 1): the sign of the largest entry of each row, 1 for a row of zeros."""
    signs = torch.sign(rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)))
    return signs.masked_fill(signs == 0, 1)


def folded(fold: Tensors, change: Factors) -> Tensors:
    """The fold with left·right of each module added: as longer factors, or as a dense matrix once that is smaller.

    Names are `<module>.fold_A`: (k, d_in) with `<module>.fold_B`: (d_out, k), or `<module>.fold`: (d_out, d_in); the LoRA
    scale is included. A fold is cumulative: a client sets it and needs no earlier one.
    """
    new = dict(fold)
    for m, (left, right) in change.items():
        if m + FOLD in new:
            new[m + FOLD] = (new[m + FOLD].double() + left @ right).float()
            continue
        if m + FOLD_A in new:
            left = torch.cat((new.pop(m + FOLD_B).double(), left), dim=1)
            right = torch.cat((new.pop(m + FOLD_A).double(), right), dim=0)
        (d_out, k), d_in = left.shape, right.shape[1]
        if k * (d_out + d_in) > d_out * d_in:
            new[m + FOLD] = (left @ right).float()
        else:
            new[m + FOLD_A], new[m + FOLD_B] = right.float(), left.float()
    return new


def as_fold(adapter: Tensors, share: float, info: AdapterInfo) -> Tensors:
    """The fold that adds `share` times the adapter's effective change to the base."""
    factor = share * info.scale(rank_of(adapter))
    names = modules(adapter)
    return {m + FOLD_A: adapter[m + A] for m in names} | {m + FOLD_B: adapter[m + B] * factor for m in names}


def fold_of(state: State) -> Tensors:
    """The fold so far; empty if the state has none yet."""
    return state.get("fold", {})
