"""LoRA-XS and Fed-SB: the frozen factors, what travels, and a naive twin with dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmllm.algorithms import LocalRule, RoundInfo
from fedmllm.algorithms.factors import BASIS_A, BASIS_B, A, B, R, leading_directions, modules
from fedmllm.algorithms.fed_sb import basis_of
from fedmllm.algorithms.screening import screen
from fedmllm.algorithms.toy_federation import base_gradient
from fedmllm.config import AdapterTable, LoraTable, ModelTable, TrainTable, validate
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build
from fedmllm.models.mllm import MLLM
from fedmllm.tensors import Tensors, nbytes
from fedmllm.training.cohort import Work, train_cohort
from helpers import CLIENTS, a_round, built, lora_adapter, round_info, rounds_of, same
from tiny_models import CLOSED, OPEN

CORES = {m + R: torch.zeros(2, 2) for m in modules(lora_adapter())}


def dense(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def rounds(count: int = 3, sampled: Callable[[int], tuple[int, ...]] = lambda number: CLIENTS) -> list[Any]:
    return list(rounds_of(built("fed-sb"), rounds=count, adapter=CORES, sampled=sampled))


# The algorithm


def test_rounds_are_those_of_the_naive_twin() -> None:
    """B and A are those of the SVD of the dense mean gradient, and the server's model is the mean of the clients' models."""
    history = rounds()
    shares = {u.client: u.examples / sum(u.examples for u in history[0][1]) for u in history[0][1]}
    for m in modules(lora_adapter()):
        gradients = {c: dense(base_gradient(c)[m + B]) @ dense(base_gradient(c)[m + A]) for c in CLIENTS}
        u, _, vt = np.linalg.svd(np.asarray(sum(shares[c] * gradients[c] for c in CLIENTS)))
        b, a = (dense(history[0][2]["fold"][m + side]) for side in (BASIS_B, BASIS_A))
        np.testing.assert_allclose(b @ a, u[:, :2] @ vt[:2], atol=1e-6)
        np.testing.assert_allclose(b.T @ b, np.eye(2), atol=1e-6)
        np.testing.assert_allclose(a @ a.T, np.eye(2), atol=1e-6)
        assert (a[np.arange(2), np.abs(a).argmax(1)] > 0).all()
        for _, updates, after, _ in history[1:]:
            models = sum(shares[u.client] * b @ dense(u.groups["adapter"][m + R]) @ a for u in updates)
            np.testing.assert_allclose(b @ dense(after["adapter"][m + R]) @ a, models, atol=1e-6)
            assert np.abs(models).max() > 1e-3


def test_the_first_round_trains_nothing_and_b_and_a_never_change() -> None:
    history = rounds(4)
    (_, updates, after, _), *others = history
    assert all(same({"a": u.groups["adapter"]}, {"a": CORES}) for u in updates)
    assert same({"a": after["adapter"]}, {"a": CORES})
    for before, updates, state, _ in others:
        assert same({"f": state["fold"]}, {"f": after["fold"]})
        assert all(u.groups.keys() == {"adapter"} for u in updates)
        assert not same({"a": state["adapter"]}, {"a": before["adapter"]})


def test_the_gradient_is_asked_for_until_it_is_known() -> None:
    """Whatever the number of the round: nobody may have answered in the first."""
    algorithm = built("fed-sb")
    state = algorithm.init(CORES)
    info = round_info(2, CLIENTS)
    updates = a_round(algorithm, state, {}, info, CORES)
    assert all("gradient" in u.groups for u in updates)
    assert "fold" in algorithm.aggregate(state, updates, info)


def test_bytes_are_those_of_r_and_once_those_of_a_gradient() -> None:
    """Up: r² a module, and r (d_in + d_out) more in the first round. Down: r², and B and A after it."""
    (state, updates, after, info), (_, later, _, _) = rounds(2)
    core, factors = 4 * 2 * 2 * len(CORES), 4 * 2 * (3 + 4) * len(CORES)
    assert {nbytes(u.groups["gradient"]) for u in updates} == {factors}
    assert {nbytes(u.groups["adapter"]) for u in updates + later} == {core}
    algorithm = built("fed-sb")
    assert {g: nbytes(t) for g, t in algorithm.message(state, 0, info).items()} == {"adapter": core}
    assert {g: nbytes(t) for g, t in algorithm.message(after, 0, info).items()} == {"adapter": core, "fold": factors}


def test_directions_that_no_gradient_has_are_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, 5, generator=generator), torch.randn(4, 1, generator=generator)
    one = {"m" + A: torch.cat((a, torch.zeros(1, 5))), "m" + B: torch.cat((b, torch.zeros(4, 1)), dim=1)}
    nothing = {"m" + A: torch.zeros(2, 5), "m" + B: torch.zeros(4, 2)}
    basis = basis_of([one, nothing], [1.0, 2.0])
    torch.testing.assert_close(basis["m" + BASIS_B] @ basis["m" + BASIS_A], (b / b.norm()) @ (a / a.norm()))
    assert not basis["m" + BASIS_A][1].any()
    assert not any(bool(t.any()) for t in basis_of([nothing], [1.0]).values())


def test_a_gradient_that_drowns_the_others_is_refused() -> None:
    state, updates, _, info = rounds(1)[0]
    loud = {name: 1e6 * t for name, t in updates[2].groups["gradient"].items()}
    hostile = replace(updates[2], groups={**updates[2].groups, "gradient": loud})
    valid, refused = screen([*updates[:2], hostile], built("fed-sb"), state, info, 100.0)
    assert [u.client for u in valid] == [u.client for u in updates[:2]]
    assert "its change of the adapter's 'gradient' has norm" in str(refused[0]["why"])


def test_an_adapter_without_frozen_factors_is_refused() -> None:
    with pytest.raises(ValueError, match="no base weights to start from"):
        built("fed-sb").uploads({"adapter": CORES}, 0, RoundInfo(0, 1, 1, (0,), 0))


FED_SB: dict[str, Any] = {"algorithm": {"name": "fed-sb"}, "model": {"adapter": {"kind": "lora-xs"}}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"algorithm": {"name": "fed-sb"}}, "and model.adapter.kind = 'lora' has none; set the kind to \"lora-xs\""),
    ({"algorithm": {"name": "fed-sb"}, "model": {"quantize": "4bit", "adapter": {"kind": "lora-xs"}}},
     "'fed-sb' needs gradients of the base weights, and model.quantize = '4bit' stores weights that have none"),
    ({"clients": {"rank": [2, 4]}, "model": {"adapter": {"kind": "lora-xs"}}}, "averages matrices R of one size"),
    ({"algorithm": {"name": "flora"}, "model": {"adapter": {"kind": "lora-xs"}}}, "works on LoRA's factors A and B alone"),
    ({**FED_SB, "secure": {"name": "pairwise"}},
     "algorithm.name = 'fed-sb' works on single updates"),
    ({**FED_SB, "privacy": {"name": "user-level", "noise": 1.0, "delta": 1e-3}},
     "algorithm.name = 'fed-sb' uses more of the updates than the mean of the adapters"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "sentence"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_does_not_go_together_is_refused(parts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(validate({"task": {"name": "pocket-memes"}, **parts}))
    assert sentence in str(error.value)


# The directions


def test_leading_directions_are_the_largest_singular_vectors() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 20, generator=generator, dtype=torch.float64))[0] for n in (40, 30))
    weight = left @ torch.diag(0.5 ** torch.arange(20.0, dtype=torch.float64)) @ right.T
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        u, sigma, vt = leading_directions(weight, 4)
        torch.testing.assert_close(u * sigma @ vt, left[:, :4] @ torch.diag(sigma) @ right[:, :4].T, rtol=0, atol=1e-9)
        torch.testing.assert_close(sigma, 0.5 ** torch.arange(4.0, dtype=torch.float64))
        assert (vt[torch.arange(4), vt.abs().argmax(1)] > 0).all()
        results.append((u, vt))
    for first, second in zip(*results, strict=True):  # the random start decides neither the vectors nor their signs
        torch.testing.assert_close(first, second, rtol=0, atol=1e-9)


# On a model


def load(tiny: Path, **lora: Any) -> MLLM:
    table = LoraTable.model_validate({"rank": 3, "alpha": 6.0, **lora})
    return MLLM.load(ModelTable(name=str(tiny), lora=table, adapter=AdapterTable(kind="lora-xs"), precision="fp32"), seed=0)


@pytest.fixture(scope="module")
def model(tiny: Path) -> MLLM:
    return load(tiny)


def work_of(model: MLLM, dataset: Path, rule: LocalRule) -> Work:
    """Two clients' worth of samples in a single step."""
    batch = model.encode([*OPEN, CLOSED], [dataset / "red.png", None, dataset / "blue.png"], 200)
    return Work([[batch]], model.adapter.get(), rule, 0)


def test_the_frozen_factors_belong_to_the_base_weights(model: MLLM) -> None:
    assert set(model.adapter.parameters) == {m + R for m in model.adapter.cores}
    assert {tuple(p.shape) for p in model.adapter.parameters.values()} == {(3, 3)}
    for base, a, _ in model.adapter.pairs():
        m = a.removesuffix(A)
        weight = base.weight.detach().double()
        a_factor, b_factor = (model.adapter.basis[m + side].double() for side in (A, B))
        for gram in (a_factor @ a_factor.T, b_factor.T @ b_factor):
            torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
        sigma = torch.linalg.svdvals(weight)[:3]
        torch.testing.assert_close(b_factor.T @ weight @ a_factor.T, torch.diag(sigma), rtol=1e-3, atol=1e-3 * float(sigma[0]))


def test_the_first_gradient_of_r_holds_the_singular_values_of_the_weights_gradient(model: MLLM, dataset: Path) -> None:
    """∂L/∂R = s Bᵀ G Aᵀ, which is s Σ_r under the factors of G; computed by other code than G is. So the first step of SGD
    brings R to what LoRA-SB starts from."""
    gradient = train_cohort(model, [work_of(model, dataset, LocalRule(lr_factor=0.0, observe_base=True))], TrainTable())[0]
    assert same({"a": gradient.trained}, {"a": gradient.received})
    factors = gradient.base_gradient
    assert factors is not None
    basis = basis_of([factors], [1.0])
    model.adapter.set_fold(basis)
    sgd = TrainTable(optimizer="sgd", lr=1e-3, clip=0.0)
    result = train_cohort(model, [work_of(model, dataset, LocalRule(observe_gradient=True))], sgd)[0]
    assert result.mean_gradient is not None
    scale = model.info.scale(3)
    for m in model.adapter.cores:
        sigma = torch.diag(factors[m + B].norm(dim=0))
        close = {"rtol": 1e-3, "atol": 1e-3 * float(sigma.max()) * scale}
        torch.testing.assert_close(result.mean_gradient[m + R], scale * sigma, **close)
        step = 1e-3
        torch.testing.assert_close(result.trained[m + R] / -step, scale * sigma, **close)


def test_another_basis_replaces_the_own_one_until_the_fold_is_gone(model: MLLM) -> None:
    model.adapter.set_fold({})
    own: Tensors = model.adapter.factors({n: torch.eye(3) for n in model.adapter.parameters})
    zeros = {
        name.replace(".lora_", ".basis_").removesuffix(".weight"): torch.zeros_like(t)
        for name, t in model.adapter.basis.items()
    }
    model.adapter.set_fold(zeros)
    assert not any(bool(t.any()) for t in model.adapter.factors({n: torch.eye(3) for n in model.adapter.parameters}).values())
    assert all(bool(t.any()) for t in model.adapter.basis.values()), "what belongs to the base weights stays"
    model.adapter.set_fold({})
    assert same({"f": model.adapter.factors({n: torch.eye(3) for n in model.adapter.parameters})}, {"f": own})


def test_a_client_without_samples_has_the_gradient_0(model: MLLM) -> None:
    work = Work([], model.adapter.get(), LocalRule(lr_factor=0.0, observe_base=True), 0)
    gradient = train_cohort(model, [work], TrainTable())[0].base_gradient
    assert gradient is not None
    assert not any(bool(t.any()) for name, t in gradient.items() if name.endswith(B))


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"rank": 40}, r"model\.lora\.rank = 40: .* the smaller side of .*_proj' is 32; lower the rank"),
        (
            {"target": ".*patch_embedding"},
            r"adapts linear layers only, and model\.lora\.target = '\.\*patch_embedding' matches",
        ),
    ],
)
def test_layers_without_a_square_matrix_are_refused(tiny: Path, lora: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(tiny, **lora)
