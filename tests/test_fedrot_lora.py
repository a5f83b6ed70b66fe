"""FedRot-LoRA against a naive twin: clients rotate their factors before these are averaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

from fedmllm.algorithms import LocalResult, RoundInfo, Update
from fedmllm.algorithms.factors import A, B, modules
from fedmllm.algorithms.fedrot_lora import aligned, rotation_to
from fedmllm.algorithms.screening import screen
from fedmllm.errors import ConfigError
from fedmllm.tensors import Tensors
from helpers import CLIENTS, built, quick, round_info, rounds_of, same, update
from products import assert_close, dense, effective, random_adapter


def turned(adapter: Tensors, r: np.ndarray) -> Tensors:
    """The same product from other factors: Rᵀ A and B R."""
    new: Tensors = {}
    for m in modules(adapter):
        new[m + A] = torch.tensor(r.T @ dense(adapter[m + A]), dtype=torch.float32)
        new[m + B] = torch.tensor(dense(adapter[m + B]) @ r, dtype=torch.float32)
    return new


def turn(degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def upload_of(name: str, trained: Tensors, received: Tensors, number: int, **options: float) -> Tensors:
    """What a client sends in round `number`."""
    result = LocalResult(received, trained, None, 1, 1, 0.1, {})
    return built(name, **options).finish(result, {"adapter": received}, {}, round_info(number))[0]["adapter"]


def naive_alignment(
    a: np.ndarray, b: np.ndarray, a_ref: np.ndarray, b_ref: np.ndarray, t: int, share: float
) -> list[np.ndarray]:
    """The formula: the polar factor of M, or the best proper rotation if that is a reflection; then the interpolation."""
    m = a @ a_ref.T if t % 2 else b.T @ b_ref
    r = linalg.polar(m)[0]
    if np.linalg.det(r) < 0:
        u, _, vt = np.linalg.svd(m)
        r = sum(sign * np.outer(left, right) for sign, left, right in zip((*[1] * (len(m) - 1), -1), u.T, vt, strict=True))
    r = linalg.polar((1 - share) * np.eye(len(r)) + share * r)[0]
    return [r.T @ a, b @ r]


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_fedrot_equals_its_naive_twin(share: float) -> None:
    for before, updates, after, info in rounds_of(built("fedrot-lora", rotation=share), rounds=5):
        plain = {u.client: u.groups["adapter"] for u in trained_from(before["adapter"], info)}
        weights = np.array([u.examples for u in updates]) / sum(u.examples for u in updates)
        for m in modules(before["adapter"]):
            expected = []
            for client in CLIENTS:
                pair = [dense(plain[client][m + suffix]) for suffix in (A, B)]
                reference = [dense(before["adapter"][m + suffix]) for suffix in (A, B)]
                expected.append(naive_alignment(*pair, *reference, info.round, share) if info.round else pair)
            for place, suffix in enumerate((A, B)):
                for u, factors in zip(updates, expected, strict=True):
                    np.testing.assert_allclose(dense(u.groups["adapter"][m + suffix]), factors[place], atol=1e-5)
                mean = sum(w * factors[place] for w, factors in zip(weights, expected, strict=True))
                np.testing.assert_allclose(dense(after["adapter"][m + suffix]), mean, atol=1e-5)


def trained_from(adapter: Tensors, info: RoundInfo) -> list[Update]:
    """What the clients would send under FedAvg."""
    start = rounds_of(built("fedavg"), rounds=1, adapter=adapter, sampled=lambda _: info.sampled)
    return next(iter(start))[1]


@quick
@given(seed=st.integers(0, 1000), rank=st.integers(1, 4), share=st.floats(0, 1), number=st.integers(1, 2))
def test_fedrot_changes_factors_and_never_a_product(seed: int, rank: int, share: float, number: int) -> None:
    trained, received = random_adapter(seed, rank, layers=2), random_adapter(seed + 1, rank, layers=2)
    sent = upload_of("fedrot-lora", trained, received, number, rotation=share)
    assert_close(effective(sent), effective(trained), 1e-5)


def test_fedrot_without_rotation_is_fedavg_bit_for_bit() -> None:
    plain = rounds_of(built("fedavg", server_lr=0.5))
    for ours, theirs in zip(rounds_of(built("fedrot-lora", rotation=0.0, server_lr=0.5)), plain, strict=True):
        assert same(ours[2], theirs[2])


def test_fedrot_sends_the_first_round_as_it_is() -> None:
    trained, received = random_adapter(0), random_adapter(1)
    assert same({"a": upload_of("fedrot-lora", trained, received, 0, rotation=1.0)}, {"a": trained})
    assert not same({"a": upload_of("fedrot-lora", trained, received, 1, rotation=1.0)}, {"a": trained})


@pytest.mark.parametrize("number", [1, 2])
def test_fedrot_undoes_rotations_that_fedavg_averages_away(number: int) -> None:
    """Copies of one pair, each turned, are one product; the plain mean of their factors is a much smaller one."""
    pair, received = random_adapter(0), random_adapter(1)
    copies = [turned(pair, turn(degrees)) for degrees in (0, 70, 160, 275)]
    algorithm = built("fedrot-lora", rotation=1.0)
    sent = [upload_of("fedrot-lora", copy, received, number, rotation=1.0) for copy in copies]
    mean = algorithm.aggregate({"adapter": received}, [update(c, u) for c, u in enumerate(sent)], round_info(number))
    assert_close(effective(mean["adapter"]), effective(pair), 1e-5)
    plain = algorithm.aggregate({"adapter": received}, [update(c, u) for c, u in enumerate(copies)], round_info(number))
    lost = effective(pair)["m0"] - effective(plain["adapter"])["m0"]
    assert np.abs(lost).max() > 0.5 * np.abs(effective(pair)["m0"]).max()


@pytest.mark.parametrize("suffix", [A, B])
@pytest.mark.parametrize("seed", range(6))
def test_the_rotation_is_the_nearest_of_all_proper_ones(suffix: str, seed: int) -> None:
    """Against every angle; a reflection, which would often be nearer, is none of them."""
    trained, received = random_adapter(seed), random_adapter(seed + 50)

    def distance(adapter: Tensors) -> float:
        return float((adapter["m0" + suffix] - received["m0" + suffix]).norm())

    least = min(distance(turned(trained, turn(degrees))) for degrees in np.arange(0, 360, 0.25))
    assert distance(aligned(trained, received, suffix, 1.0)) <= least + 1e-6


def test_no_reflection_is_used() -> None:
    mirror = torch.diag(torch.tensor([1.0, -0.5])).double()
    assert float(torch.linalg.det(rotation_to(mirror, 1.0))) == pytest.approx(1)
    torch.testing.assert_close(rotation_to(mirror, 1.0), torch.eye(2).double())
    torch.testing.assert_close(rotation_to(-torch.eye(1).double(), 1.0), torch.eye(1).double())  # rank 1: nothing can turn


@pytest.mark.parametrize(("degrees", "share", "expected"), [
    (90, 0.5, 45), (90, 1.0, 90), (90, 0.0, 0), (-90, 0.5, -45), (60, 0.5, 30),
    (180, 0.5, 180), (180, 0.4, 0), (180, 0.6, 180),
])  # fmt: skip
def test_a_share_of_the_rotation(degrees: float, share: float, expected: float) -> None:
    """Half of a quarter-turn is an eighth; half of a half-turn is undefined, and then it is made in full."""
    found = rotation_to(torch.tensor(turn(degrees)), share)
    np.testing.assert_allclose(found.numpy(), turn(expected), atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_client_is_refused_by_the_server_and_not_lost_in_the_svd(value: float) -> None:
    algorithm, received = built("fedrot-lora"), random_adapter(1)
    spoilt = {name: torch.full_like(tensor, value) for name, tensor in received.items()}
    sent = [update(c, upload_of("fedrot-lora", a, received, 1)) for c, a in enumerate((received, spoilt, received))]
    valid, refused = screen(sent, algorithm, {"adapter": received}, round_info(1))
    assert [u.client for u in valid] == [0, 2]
    assert "NaN or infinity" in str(refused[0]["why"])


def test_a_reference_of_zero_turns_nothing() -> None:
    trained, received = random_adapter(0), {n: torch.zeros_like(t) for n, t in random_adapter(1).items()}
    for number in (1, 2):
        assert same({"a": upload_of("fedrot-lora", trained, received, number)}, {"a": trained})


@pytest.mark.parametrize("rotation", [1.5, -0.1])
def test_a_rotation_out_of_range_is_refused(rotation: float) -> None:
    with pytest.raises(ConfigError, match=f"rotation = {rotation} must be at least 0 and at most 1"):
        built("fedrot-lora", rotation=rotation)


def test_it_can_be_combined_with_all_that_fedavg_can_but_not_with_unequal_ranks() -> None:
    algorithm = built("fedrot-lora")
    assert algorithm.needs_lora
    assert built("fedrot-lora", weighting="uniform").averages == "uniform"
    assert algorithm.averages == "examples"
    assert not algorithm.unequal_ranks
    assert not algorithm.refactors
    assert not algorithm.personal
