"""FRLoRA against a naive twin with dense base weights, and its identities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmllm.algorithms import AdapterInfo, RoundInfo
from fedmllm.algorithms.factors import A, B, modules, principal_state
from fedmllm.algorithms.toy_federation import principal
from fedmllm.tensors import State, Tensors
from helpers import ADAPTER_INFO, CLIENTS, a_round, built, lora_adapter, round_info, rounds_of, same

SCALE = ADAPTER_INFO.scale(2)


def dense(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def product(adapter: Tensors, module: str) -> np.ndarray:
    return SCALE * dense(adapter[module + B]) @ dense(adapter[module + A])


def change_of_base(state: State, module: str) -> np.ndarray:
    """What the fold adds to the module's weight."""
    fold = state.get("fold", {})
    if module + ".fold" in fold:
        return dense(fold[module + ".fold"])
    left, right = fold.get(module + ".fold_B"), fold.get(module + ".fold_A")
    return np.zeros((4, 3)) if left is None or right is None else dense(left) @ dense(right)


def whole(state: State, module: str) -> np.ndarray:
    """All that is added to the module's weight."""
    return change_of_base(state, module) + product(state["adapter"], module)


def test_rounds_are_those_of_the_naive_twin() -> None:
    """Base ← base + s (B̄ Ā − B₀ A₀), past the point where the factors outgrow the dense matrix."""
    start = principal()["adapter"]
    expected = {m: -product(start, m) for m in modules(start)}
    forms = set()
    for _, updates, after, _ in rounds_of(built("frlora"), rounds=5):
        total = sum(u.examples for u in updates)
        for m in expected:
            mean_a, mean_b = (
                np.asarray(sum(u.examples / total * dense(u.groups["adapter"][m + side]) for u in updates)) for side in (A, B)
            )
            expected[m] = expected[m] + SCALE * mean_b @ mean_a - product(start, m)
            np.testing.assert_allclose(change_of_base(after, m), expected[m], rtol=1e-5, atol=1e-5)
        assert same({"a": after["adapter"]}, {"a": start}), "clients start from the same factors in every round"
        forms |= {name.rpartition(".")[2] for name in after["fold"]}
    assert "fold" in forms


def test_the_first_message_leaves_the_model_as_it_is() -> None:
    algorithm = built("frlora")
    state = algorithm.init(lora_adapter())
    message = algorithm.message(state, 0, round_info())
    for m in modules(message["adapter"]):
        np.testing.assert_allclose(whole(message, m), 0, atol=1e-6)
        np.testing.assert_array_equal(whole(state, m), 0)


def still(info: RoundInfo, state: State) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(module, before, after) of a round in which nobody moves."""
    algorithm = built("frlora")
    updates = a_round(algorithm, state, {}, info)
    sent = algorithm.message(state, 0, info)["adapter"]
    after = algorithm.aggregate(state, [replace(u, groups={"adapter": sent}) for u in updates], info)
    for m in modules(sent):
        yield m, whole(state, m), whole(after, m)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_nothing_is_folded_if_nobody_moves(number: int) -> None:
    states = [built("frlora").init(lora_adapter()), *(after for _, _, after, _ in rounds_of(built("frlora")))]
    for _, before, after in still(round_info(number, CLIENTS), states[number]):
        np.testing.assert_allclose(after, before, atol=2e-6)


def test_the_model_of_a_single_client_is_kept() -> None:
    """Base + s B₀ A₀ after the round is base + s B_k A_k before it."""
    algorithm = built("frlora")
    for state, updates, after, info in rounds_of(algorithm, sampled=lambda number: (number,)):
        sent = algorithm.message(state, updates[0].client, info)
        for m in modules(sent["adapter"]):
            trained = change_of_base(sent, m) + product(updates[0].groups["adapter"], m)
            np.testing.assert_allclose(whole(after, m), trained, atol=2e-6)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_start_holds_the_largest_singular_values(rank: int, stabilised: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    weights = {"m": torch.randn(7, 4, generator=generator), "n": torch.randn(3, 5, generator=generator)}
    scale = AdapterInfo(alpha=8.0, rank_stabilised=stabilised).scale(rank)
    state = principal_state(weights, rank, scale)
    for m, weight in weights.items():
        a, b = dense(state["adapter"][m + A]), dense(state["adapter"][m + B])
        assert (a.shape, b.shape) == ((rank, weight.shape[1]), (weight.shape[0], rank))
        u, sigma, vt = np.linalg.svd(dense(weight), full_matrices=False)
        np.testing.assert_allclose(scale * b @ a, (u[:, :rank] * sigma[:rank]) @ vt[:rank], atol=1e-5)
        np.testing.assert_allclose(np.square(a).sum(1), np.square(b).sum(0), atol=1e-5)
        largest = a[np.arange(rank), np.abs(a).argmax(1)]
        assert (largest[: min(weight.shape)] > 0).all()
        fold = dense(state["fold"][m + ".fold_B"]) @ dense(state["fold"][m + ".fold_A"])
        np.testing.assert_allclose(fold, -scale * b @ a, atol=1e-6)


def test_bytes_down_grow_by_twice_the_rank_a_round() -> None:
    """Until the dense matrix is smaller. Clients send the adapter."""
    algorithm, info = built("frlora"), round_info(0, CLIENTS)
    generator = torch.Generator().manual_seed(4)
    start = principal_state({"m": torch.randn(40, 50, generator=generator)}, 2, 1.5)
    wide = replace(info, adapter=AdapterInfo(alpha=3.0, principal=lambda: start))
    state = algorithm.init({name: torch.zeros_like(t) for name, t in start["adapter"].items()})
    for number in range(3):
        message = algorithm.message(state, 0, wide)
        assert {name: tuple(t.shape) for name, t in message["fold"].items()} == {
            "m.fold_A": (2 + 4 * number, 50), "m.fold_B": (40, 2 + 4 * number)
        }  # fmt: skip
        updates = a_round(algorithm, state, {}, wide, start["adapter"])
        assert all(u.groups.keys() == {"adapter"} for u in updates)
        state = algorithm.aggregate(state, updates, wide)


def test_an_adapter_without_base_weights_is_refused() -> None:
    algorithm = built("frlora")
    info = replace(round_info(), adapter=AdapterInfo())
    with pytest.raises(ValueError, match="no base weights to start from"):
        algorithm.message(algorithm.init(lora_adapter()), 0, info)
