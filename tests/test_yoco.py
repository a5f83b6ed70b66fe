"""YOCO against a naive twin with autograd and an explicit PCA, its identities, and its switches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import algorithms
from fedmllm.algorithms.factors import A, B, half, modules
from fedmllm.algorithms.toy_federation import principal
from fedmllm.algorithms.yoco import principal_mean, sign_gradient
from fedmllm.errors import ConfigError
from fedmllm.tensors import Tensors, bytes_by_group
from helpers import ADAPTER_INFO, CLIENTS, LR, built, examples_of, lora_adapter, quick, round_info, rounds_of, same, steps_of
from helpers import target as minimum

SCALE = ADAPTER_INFO.scale(2)
OFF = {"sign": 0.0, "sparsity": 0.0}
# With larger γ the sign term is so steep near 0 that plain gradient descent jumps, and rounding with it.
CALM = {"gamma_max": 5.0, "sparsity": 0.05}


def first_round(**options: Any) -> tuple[Any, ...]:
    """(state before, updates, state after, info) of the first round."""
    return next(rounds_of(built("yoco", **options)))


# The naive twin


def trained_naively(client: int, start: Tensors, sign: float, gamma_max: float, sparsity: float) -> Tensors:
    """Plain gradient descent on the whole loss, by autograd in float64."""
    signs = {name: t.double().sign() for name, t in start.items()}
    w = {name: t.double() for name, t in start.items()}
    for step in range(steps_of(client)):
        w = {name: t.detach().requires_grad_() for name, t in w.items()}
        gamma = gamma_max - 0.5 * (gamma_max - 1) * (1 + math.cos(math.pi * step / steps_of(client)))
        loss = torch.zeros((), dtype=torch.float64)
        for name, t in w.items():
            loss = loss + 0.5 * (t - minimum(client, name, t.shape)).square().sum()
            if name.endswith(B):
                loss = loss + sign * torch.norm(torch.tanh(gamma * t) - signs[name]) / (torch.norm(signs[name]) + 1e-6)
            else:
                loss = loss + sparsity * t.abs().sum()
        gradients = torch.autograd.grad(loss, list(w.values()))
        w = {name: t.detach() - LR * g for (name, t), g in zip(w.items(), gradients, strict=True)}
    return w


def averaged_naively(items: list[np.ndarray], weights: list[float], components: int) -> np.ndarray:
    """Eigenvectors of the covariance, coordinates along them, their weighted mean, and back."""
    x = np.stack([item.ravel() for item in items])
    centre = x.mean(axis=0)
    _, vectors = np.linalg.eigh((x - centre).T @ (x - centre))
    axes = vectors[:, ::-1][:, :components]
    coordinates = [axes.T @ (row - centre) for row in x]
    mean = sum(w * c for w, c in zip(weights, coordinates, strict=True)) / sum(weights)
    return (centre + axes @ mean).reshape(items[0].shape)


@pytest.mark.parametrize("components", [1, 2])
def test_the_round_is_that_of_the_naive_twin(components: int) -> None:
    start = principal()["adapter"]
    _, updates, after, _ = first_round(components=components, sign=0.7, **CALM)
    expected = {c: trained_naively(c, start, 0.7, 5.0, 0.05) for c in CLIENTS}
    weights = [float(examples_of(c)) for c in CLIENTS]
    for u in updates:
        for name, t in expected[u.client].items():
            torch.testing.assert_close(u.groups["adapter"][name].double(), t, rtol=1e-4, atol=1e-5)
    for name, t in after["adapter"].items():
        items = [expected[c][name].numpy() for c in CLIENTS]
        mean = np.average(items, axis=0, weights=weights)
        wanted = averaged_naively(items, weights, components) if name.endswith(A) else mean
        np.testing.assert_allclose(t.numpy(), wanted, rtol=1e-4, atol=1e-5)


# The terms of the loss


@given(st.integers(0, 99), st.floats(0.5, 20.0))
@quick
def test_the_gradient_of_the_sign_term_is_that_of_autograd(seed: int, gamma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, start = (0.3 * torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    start[0] = 0.0
    b.requires_grad_()
    term = torch.norm(torch.tanh(gamma * b) - start.sign()) / (torch.norm(start.sign()) + 1e-6)
    (expected,) = torch.autograd.grad(term, b)
    torch.testing.assert_close(sign_gradient(b.detach(), start, gamma), expected)


def test_the_sign_term_pulls_towards_the_signs_and_stops_there() -> None:
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert torch.equal(sign_gradient(0.1 * signs.flip(0), signs, 1.0).sign(), -signs)
    assert torch.equal(sign_gradient(10 * signs, signs, 200.0), torch.zeros(2, 2))
    assert torch.equal(sign_gradient(torch.zeros(2, 2), torch.zeros(2, 2), 200.0), torch.zeros(2, 2))


def test_gamma_rises_from_one_to_its_maximum() -> None:
    start = principal()["adapter"]
    rule = built("yoco", gamma_max=9.0).rule({"adapter": start}, {}, round_info())
    assert rule.penalty is not None
    moved = {name: t + 0.1 for name, t in start.items()}
    for done, gamma in ((0.0, 1.0), (0.5, 5.0), (1.0, 9.0)):
        for name, gradient in half(rule.penalty(moved, start, done), B).items():
            torch.testing.assert_close(gradient, sign_gradient(moved[name], start[name], gamma))


@pytest.mark.parametrize(("off", "penalised"), [("sign", {A}), ("sparsity", {B}), ("", {A, B})])
def test_each_term_can_be_switched_off(off: str, penalised: set[str]) -> None:
    start = principal()["adapter"]
    penalty = built("yoco", **({off: 0.0} if off else {})).rule({"adapter": start}, {}, round_info()).penalty
    assert penalty is not None
    names = set(penalty(start, start, 0.25))
    assert names == {name for name in start if any(name.endswith(suffix) for suffix in penalised)}
    assert built("yoco", **OFF).rule({"adapter": start}, {}, round_info()).penalty is None


def test_the_terms_do_what_they_are_for() -> None:
    """B keeps more of its signs, and A is smaller, than without them."""
    start = principal()["adapter"]

    def kept(options: dict[str, float]) -> float:
        after = first_round(**options)[2]["adapter"]
        return float(sum((after[n].sign() == b.sign()).sum() for n, b in half(start, B).items()))

    def size(options: dict[str, float]) -> float:
        return float(sum(a.abs().sum() for a in half(first_round(**options)[2]["adapter"], A).values()))

    assert kept({"sign": 5.0, "gamma_max": 5.0, "sparsity": 0.0}) > kept(OFF)
    assert size({"sign": 0.0, "sparsity": 0.5}) < size(OFF)


# The start


def test_the_first_message_is_the_base_model_or_doubles_its_principal_part() -> None:
    for compensate in (True, False):
        algorithm = built("yoco", compensate=compensate)
        message = algorithm.message(algorithm.init(lora_adapter()), 0, round_info())
        assert same({"adapter": message["adapter"]}, {"adapter": principal()["adapter"]})
        for m in modules(message["adapter"]):
            product = SCALE * message["adapter"][m + B] @ message["adapter"][m + A]
            fold = message["fold"][m + ".fold_B"] @ message["fold"][m + ".fold_A"] if compensate else torch.zeros(4, 3)
            torch.testing.assert_close(product + fold, torch.zeros(4, 3) if compensate else product, rtol=0, atol=1e-6)
        assert ("fold" in message) == compensate


@pytest.mark.parametrize("compensate", [True, False])
def test_what_travels(compensate: bool) -> None:
    """The fold has as many numbers as the adapter, and is the same in every round."""
    adapter = bytes_by_group({"adapter": lora_adapter()})["adapter"]
    algorithm, folds = built("yoco", compensate=compensate, **CALM), []
    for state, updates, after, info in rounds_of(algorithm):
        message = algorithm.message(state, 0, info)
        assert bytes_by_group(message) == {"adapter": adapter} | ({"fold": adapter} if compensate else {})
        assert all(bytes_by_group(u.groups) == {"adapter": adapter} for u in updates)
        folds.append({g: t for g, t in after.items() if g == "fold"})
    assert all(same(fold, folds[0]) for fold in folds)


def test_the_state_is_the_base_model_until_somebody_answered() -> None:
    algorithm = built("yoco")
    state = algorithm.init(lora_adapter())
    assert all(not t.any() for t in state["adapter"].values())
    late = algorithm.message(state, 0, round_info(2))
    assert same(late, algorithm.message(state, 0, round_info(0)))


# The aggregation


@pytest.mark.parametrize("components", [0, 1])
def test_without_terms_it_is_fedavg_from_its_start(components: int) -> None:
    """Also in further rounds, and where PCA keeps few components of clients that weigh alike."""
    weighting = "uniform" if components else "examples"
    ours = rounds_of(built("yoco", components=components, weighting=weighting, **OFF))
    theirs = rounds_of(built("fedavg", weighting=weighting), adapter=principal()["adapter"])
    for (*_, after, _), (*_, expected, _) in zip(ours, theirs, strict=True):
        assert same({"adapter": after["adapter"]}, {"adapter": expected["adapter"]})


@pytest.mark.parametrize("components", [2, 3, 9])
def test_all_components_are_the_weighted_mean(components: int) -> None:
    """Three clients span two directions around their mean."""
    (*_, full, _), (*_, mean, _) = first_round(components=components), first_round()
    for name, t in full["adapter"].items():
        torch.testing.assert_close(t, mean["adapter"][name], rtol=1e-6, atol=1e-6)


@given(st.integers(0, 99), st.integers(2, 6), st.integers(0, 6))
@quick
def test_the_principal_mean_lies_between_the_means(seed: int, clients: int, components: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randn(clients, 7, generator=generator, dtype=torch.float64)
    weights = torch.rand(clients, generator=generator, dtype=torch.float64) + 0.1
    weights /= weights.sum()
    plain, weighted = items.mean(0), weights @ items
    ours = principal_mean(items, weights, components)
    # A projection: what it leaves out is orthogonal to what it keeps.
    assert float((ours - plain) @ (weighted - ours)) == pytest.approx(0, abs=1e-9)
    if components == 0:
        torch.testing.assert_close(ours, plain)
    if components >= clients - 1:
        torch.testing.assert_close(ours, weighted)
    equal = torch.full((clients,), 1 / clients, dtype=torch.float64)
    torch.testing.assert_close(principal_mean(items, equal, components), plain)


@pytest.mark.parametrize("rule", ["fedadagrad", "fedyogi", "fedavgm"])
def test_b_follows_the_servers_rule_and_a_is_averaged(rule: str) -> None:
    """After one round FedAvgM's momentum is the mean change, so that it needs no rule of its own."""
    _, updates, after, info = first_round(b_rule="fedavg" if rule == "fedavgm" else rule, **CALM)
    server, start = built(rule), principal()["adapter"]
    expected = server.aggregate(server.init(start), updates, info)["adapter"]
    mean = first_round(**CALM)[2]["adapter"]
    assert same({"b": half(after["adapter"], B)}, {"b": half(expected, B)})
    assert same({"a": half(after["adapter"], A)}, {"a": half(mean, A)})
    assert (rule == "fedavgm") == same({"b": half(mean, B)}, {"b": half(expected, B)})


def test_what_it_promises() -> None:
    """Secure aggregation hides single updates, which a truncated PCA of unequal weights needs."""
    assert [built("yoco", **options).averages for options in ({}, {"weighting": "uniform"}, {"components": 2})] == [
        "examples", "uniform", None
    ]  # fmt: skip
    assert built("yoco", components=2, weighting="uniform").averages == "uniform"
    assert not built("yoco").unequal_ranks


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sign": -1.0}, r"sign = -1\.0 must not be negative"),
        ({"sparsity": -0.1}, r"sparsity = -0\.1 must not be negative"),
        ({"components": -1}, "components = -1 must not be negative"),
        ({"gamma_max": 0.5}, r"gamma_max = 0\.5 must be at least 1, where the schedule begins"),
        ({"b_rule": "median"}, "b_rule"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        algorithms.build("yoco", options)
