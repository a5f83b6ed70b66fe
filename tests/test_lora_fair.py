"""LoRA-FAIR against its formula, and its identities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmllm.algorithms import Update
from fedmllm.algorithms.factors import A, B, half, modules
from fedmllm.errors import ConfigError
from fedmllm.tensors import Tensors
from helpers import a_round, built, lora_adapter, round_info, rounds_of, same, tensors, update


def dense(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def means(updates: Sequence[Update], module: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T = Σ p_k B_k A_k, B̄ and Ā."""
    shares = [u.examples / sum(other.examples for other in updates) for u in updates]
    pairs = [(dense(u.groups["adapter"][module + B]), dense(u.groups["adapter"][module + A])) for u in updates]
    target = sum(p * (b @ a) for p, (b, a) in zip(shares, pairs, strict=True))
    mean_b = sum(p * b for p, (b, _) in zip(shares, pairs, strict=True))
    mean_a = sum(p * a for p, (_, a) in zip(shares, pairs, strict=True))
    return np.asarray(target), np.asarray(mean_b), np.asarray(mean_a)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 3.0])
def test_b_is_corrected_as_the_formula_says(ridge: float) -> None:
    """ΔB solves min ‖T − (B̄ + ΔB) Ā‖² + λ ‖ΔB‖²: here as one least-squares problem over all equations, λ's included."""
    for _, updates, after, _ in rounds_of(built("lora-fair", ridge=ridge)):
        for m in modules(after["adapter"]):
            target, mean_b, mean_a = means(updates, m)
            rank = len(mean_a)
            strength = ridge * np.trace(mean_a @ mean_a.T) / rank
            equations = np.vstack([mean_a.T, np.sqrt(strength) * np.eye(rank)])
            values = np.vstack([(target - mean_b @ mean_a).T, np.zeros((rank, len(mean_b)))])
            correction = np.linalg.lstsq(equations, values, rcond=None)[0].T
            np.testing.assert_allclose(dense(after["adapter"][m + A]), mean_a, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(dense(after["adapter"][m + B]), mean_b + correction, rtol=1e-5, atol=1e-6)


def test_a_correction_by_hand() -> None:
    """Rank 1: T = (2·1 + 0·3)/2 = 1 and B̄ Ā = 1·2, so ΔB = (1 − 2)·2 / (4 + λ·4) = −1/2 · 1/(1 + λ)."""
    algorithm = built("lora-fair", ridge=1.0)
    state = algorithm.init(tensors(**{"m" + A: [[1.0]], "m" + B: [[0.0]]}))
    updates = [update(c, tensors(**{"m" + A: [[a]], "m" + B: [[b]]})) for c, (a, b) in enumerate([(1.0, 2.0), (3.0, 0.0)])]
    after = algorithm.aggregate(state, updates, round_info())["adapter"]
    assert float(after["m" + A]) == 2.0
    assert float(after["m" + B]) == pytest.approx(1 - 0.25)


def error(adapter: Tensors, updates: Sequence[Update]) -> float:
    """‖T − B A‖² over all modules."""
    products = {m: dense(adapter[m + B]) @ dense(adapter[m + A]) for m in modules(adapter)}
    return sum(float(np.square(means(updates, m)[0] - product).sum()) for m, product in products.items())


def test_the_product_is_closer_to_the_mean_of_the_products_than_fedavgs() -> None:
    """The less λ, the closer; an infinite λ is FedAvg."""
    *_, (state, updates, _, info) = rounds_of(built("lora-fair"))
    after = {r: built("lora-fair", ridge=r).aggregate(state, updates, info)["adapter"] for r in (0.0, 0.01, 1.0, 1e12)}
    plain = built("fedavg").aggregate(state, updates, info)["adapter"]
    errors = [error(adapter, updates) for adapter in after.values()]
    assert errors == sorted(errors)
    assert errors[1] < 0.99 * error(plain, updates)
    for name, tensor in plain.items():
        torch.testing.assert_close(after[1e12][name], tensor, rtol=1e-6, atol=1e-6)


def test_one_client_or_equal_factors_leave_nothing_to_correct() -> None:
    algorithm = built("lora-fair")
    for state, updates, after, info in rounds_of(algorithm, sampled=lambda number: (number,)):
        assert same({"adapter": after["adapter"]}, {"adapter": updates[0].groups["adapter"]})
        others = [replace(updates[0], client=client) for client in (7, 8)]
        assert same(algorithm.aggregate(state, [*updates, *others], info), after)
    state = algorithm.init(lora_adapter())
    updates = a_round(algorithm, state, {}, round_info())
    first = half(updates[0].groups["adapter"], A)
    equal_a = [replace(u, groups={"adapter": u.groups["adapter"] | first}) for u in updates]
    after = algorithm.aggregate(state, equal_a, round_info())["adapter"]
    plain = built("fedavg").aggregate(state, equal_a, round_info())["adapter"]
    for name, tensor in plain.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0], [0.0, 0.0]]])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_factors_without_full_rank_give_a_finite_result(rows: list[list[float]], ridge: float) -> None:
    algorithm = built("lora-fair", ridge=ridge)
    a, b = torch.tensor(rows), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    state = algorithm.init({"m" + A: a, "m" + B: b})
    updates = [update(c, {"m" + A: a * (1 + sign), "m" + B: b * (1 + sign)}) for c, sign in enumerate((-0.5, 0.5))]
    after = algorithm.aggregate(state, updates, round_info())["adapter"]
    assert all(bool(t.isfinite().all()) for t in after.values())
    # T is 1.25 B A and the mean product B A: the correction makes up for what the rows allow.
    assert float((after["m" + B] @ a - 1.25 * b @ a).norm()) <= float((0.25 * b @ a).norm()) * (0.02 if ridge else 1e-6)


def test_a_negative_ridge_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ridge = -0\.1 must not be negative"):
        built("lora-fair", ridge=-0.1)
