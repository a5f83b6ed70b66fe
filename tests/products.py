"""The products of LoRA's factors as dense matrices, one at a time: what the tests of the LoRA-aware methods compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedmllm.algorithms import AdapterInfo, Update
from fedmllm.algorithms.factors import A, B, modules
from fedmllm.tensors import State, Tensors
from helpers import ADAPTER_INFO

Dense = dict[str, np.ndarray]
"""module -> what the adapter and the fold add to its weight: (d_out, d_in)."""

RANKS = {0: 1, 1: 3, 3: 2}


def effective(adapter: Tensors, info: AdapterInfo = ADAPTER_INFO) -> Dense:
    """α/r B A in float64."""
    return {
        m: info.alpha / adapter[m + A].shape[0] * adapter[m + B].double().numpy() @ adapter[m + A].double().numpy()
        for m in modules(adapter)
    }


def unfolded(fold: Tensors, like: Dense) -> Dense:
    total = {m: np.zeros_like(d) for m, d in like.items()}
    for m in total:
        if m + ".fold" in fold:
            total[m] += fold[m + ".fold"].double().numpy()
        if m + ".fold_A" in fold:
            total[m] += fold[m + ".fold_B"].double().numpy() @ fold[m + ".fold_A"].double().numpy()
    return total


def whole(state: State) -> Dense:
    """All that is added to the base."""
    adapter = effective(state["adapter"])
    fold = unfolded(state.get("fold", {}), adapter)
    return {m: adapter[m] + fold[m] for m in adapter}


def mean_of_products(updates: Sequence[Update]) -> Dense:
    """Σ p_k s_k B_k A_k."""
    total = sum(u.examples for u in updates)
    each = [effective(u.groups["adapter"]) for u in updates]
    return {m: sum(u.examples / total * d[m] for u, d in zip(updates, each, strict=True)) for m in each[0]}


def truncation(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def assert_close(found: Dense, expected: Dense, tolerance: float = 1e-6) -> None:
    for m in expected:
        size = max(1.0, float(np.abs(expected[m]).max()))
        np.testing.assert_allclose(found[m], expected[m], rtol=0, atol=tolerance * size)


def dense(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def random_adapter(seed: int, rank: int = 2, d_out: int = 4, d_in: int = 3, layers: int = 1) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    adapter: Tensors = {}
    for layer in range(layers):
        adapter[f"m{layer}{A}"] = torch.randn(rank, d_in, generator=generator)
        adapter[f"m{layer}{B}"] = torch.randn(d_out, rank, generator=generator)
    return adapter
