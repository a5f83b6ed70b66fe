"""FedMomentum and FLoRA-NA, whose new factors come near to the mean of the products, against naive twins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import Update
from fedmllm.algorithms.factors import A, B, modules
from fedmllm.errors import ConfigError
from fedmllm.tensors import Tensors, add, bytes_by_group, clone
from helpers import CLIENTS, built, lora_adapter, quick, round_info, rounds_of, same, update
from products import RANKS, assert_close, dense, effective, mean_of_products, random_adapter, unfolded, whole

# FedMomentum


def naive_momentum(mean: np.ndarray, rank: int, energy: float) -> tuple[np.ndarray, np.ndarray]:
    """What the adapter adds, and what is folded."""
    u, s, vt = np.linalg.svd(mean, full_matrices=False)
    total, q = 0.0, 0
    while q < len(s) and (q == 0 or total < energy * (s**2).sum()):
        total, q = total + s[q] ** 2, q + 1
    return (u[:, :rank] * s[:rank]) @ vt[:rank], (u[:, rank:q] * s[rank:q]) @ vt[rank:q]


@pytest.mark.parametrize("ranks", [None, RANKS], ids=["equal", "unequal"])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999])
def test_fedmomentum_equals_its_naive_twin(energy: float, ranks: dict[int, int] | None) -> None:
    rank = 2 if ranks is None else 3
    start = wide_adapter(rank)
    folds = 0
    for before, updates, after, _ in rounds_of(built("fedmomentum", energy=energy), adapter=start, ranks=ranks):
        carried = unfolded(before.get("fold", {}), effective(before["adapter"]))
        for m, mean in mean_of_products(updates).items():
            kept, fold = naive_momentum(mean, rank, energy)
            assert_close(effective(after["adapter"]), {m: kept}, 1e-5)
            added = unfolded(after.get("fold", {}), effective(after["adapter"]))[m] - carried[m]
            assert_close({m: added}, {m: fold}, 1e-5)
            folds += bool(np.abs(fold).max(initial=0) > 1e-3)
    assert bool(folds) == (energy > 0.95), "the choice of energies shows both cases"


def wide_adapter(rank: int) -> Tensors:
    """Two modules wide enough for the mean of three clients' products to exceed the rank."""
    return {n: t * (0.0 if n.endswith(B) else 1.0) for n, t in random_adapter(3, rank, 7, 8, layers=2).items()}


@pytest.mark.parametrize("ranks", [None, RANKS], ids=["equal", "unequal"])
def test_fedmomentum_with_all_the_energy_is_exact(ranks: dict[int, int] | None) -> None:
    for before, updates, after, _ in rounds_of(built("fedmomentum", energy=1.0), adapter=wide_adapter(3), ranks=ranks):
        carried = unfolded(before.get("fold", {}), effective(before["adapter"]))
        assert_close(whole(after), {m: carried[m] + mean for m, mean in mean_of_products(updates).items()}, 2e-6)


def test_fedmomentum_without_a_fold_is_flexlora() -> None:
    """Its products, not its factors; the clients start from other factors, so one round is compared."""
    (_, updates, ours, info), *_ = rounds_of(built("fedmomentum", energy=0.0), adapter=wide_adapter(2), rounds=1)
    assert "fold" not in ours
    theirs = built("flexlora").aggregate({"adapter": wide_adapter(2)}, updates, info)
    assert_close(effective(ours["adapter"]), effective(theirs["adapter"]))


def test_fedmomentum_gives_both_factors_the_same_length() -> None:
    *_, (_, _, after, _) = rounds_of(built("fedmomentum"), adapter=wide_adapter(2))
    for m in modules(after["adapter"]):
        a, b = after["adapter"][m + A], after["adapter"][m + B]
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-5, atol=1e-6)


def test_fedmomentum_keeps_a_gradient_where_nothing_was_learnt() -> None:
    """A client of rank 1 alone fills one direction: the other rows of A stay, and nothing is folded."""
    start = lora_adapter(rank=3)
    run = rounds_of(built("fedmomentum"), adapter=start, sampled=lambda _: (0,), ranks={0: 1}, rounds=1)
    (_, updates, after, _), *_ = run
    assert "fold" not in after
    assert_close(effective(after["adapter"]), mean_of_products(updates), 1e-5)
    for m in modules(start):
        assert after["adapter"][m + A][1:].equal(start[m + A][1:])
        assert not bool(after["adapter"][m + B][:, 1:].any())
    untrained = [update(c, start) for c in CLIENTS]
    assert same(built("fedmomentum").aggregate({"adapter": start}, untrained, round_info()), {"adapter": start})


def test_the_fold_is_counted_in_the_bytes_that_travel() -> None:
    """Rank 2 of a mean of rank 6: the fold of a round is four more directions of each module, until dense is smaller."""
    algorithm = built("fedmomentum", energy=1.0)
    (_, _, after, info), *_ = rounds_of(algorithm, adapter=random_adapter(3, 2, 40, 50), rounds=1)
    sent = bytes_by_group(algorithm.message(after, 0, info))
    assert sent == {"adapter": 4 * 2 * (40 + 50), "fold": 4 * 4 * (40 + 50)}


# FLoRA-NA


def error_of(adapter: Tensors, updates: Sequence[Update]) -> dict[str, float]:
    """‖T − B̂ Â‖ of each module, with T = Σ p_k B_k A_k."""
    found, mean = effective(adapter), mean_of_products(updates)
    return {m: float(np.linalg.norm(found[m] - mean[m])) for m in mean}


def naive_florana(b: list[np.ndarray], a: list[np.ndarray], p: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Least squares on the dense matrices, one column of the design for each client."""
    target = sum(w * x @ y for w, x, y in zip(p, b, a, strict=True)).ravel()
    u, v = p.copy(), p.copy()
    for _ in range(steps):
        a_hat = sum(w * y for w, y in zip(v, a, strict=True))
        u = np.linalg.lstsq(np.stack([(x @ a_hat).ravel() for x in b], axis=1), target)[0]
        b_hat = sum(w * x for w, x in zip(u, b, strict=True))
        v = np.linalg.lstsq(np.stack([(b_hat @ y).ravel() for y in a], axis=1), target)[0]
    return sum(w * x for w, x in zip(u, b, strict=True)), sum(w * y for w, y in zip(v, a, strict=True))


@pytest.mark.parametrize("steps", [1, 3])
def test_flora_na_equals_its_naive_twin(steps: int) -> None:
    for _, updates, after, _ in rounds_of(built("flora-na", steps=steps), adapter=lora_adapter(layers=2)):
        p = np.array([u.examples for u in updates]) / sum(u.examples for u in updates)
        for m in modules(after["adapter"]):
            b, a = ([dense(u.groups["adapter"][m + suffix]) for u in updates] for suffix in (B, A))
            expected = naive_florana(b, a, p, steps)
            for suffix, factor in zip((B, A), expected, strict=True):
                np.testing.assert_allclose(dense(after["adapter"][m + suffix]), factor, atol=1e-5)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_flora_na_errs_less_with_every_step_and_never_less_than_the_best_factors(weighting: str) -> None:
    (_, *_), (_, updates, _, info), *_ = rounds_of(built("fedavg"), rounds=2)
    counted = [replace(u, examples=1) if weighting == "uniform" else u for u in updates]
    adapter = updates[0].groups["adapter"]
    errors = [
        error_of(
            built("flora-na", steps=steps, weighting=weighting).aggregate({"adapter": adapter}, updates, info)["adapter"],
            counted,
        )
        for steps in range(6)
    ]
    best = error_of(built("flexlora", weighting=weighting).aggregate({"adapter": adapter}, updates, info)["adapter"], counted)
    for m, least in best.items():
        falling = [error[m] for error in errors]
        assert all(later <= earlier + 1e-6 for earlier, later in pairwise(falling))
        assert least - 1e-6 <= falling[-1] < 0.9 * falling[0], "the weights are worth something here"


@quick
@given(seed=st.integers(0, 1000), clients=st.integers(1, 4), rank=st.integers(1, 3))
def test_flora_na_is_at_most_as_wrong_as_fedavg(seed: int, clients: int, rank: int) -> None:
    updates = [update(c, random_adapter(10 * seed + c, rank), c + 1) for c in range(clients)]
    state = {"adapter": random_adapter(seed, rank)}
    ours, plain = (built(name).aggregate(state, updates, round_info())["adapter"] for name in ("flora-na", "fedavg"))
    assert error_of(ours, updates)["m0"] <= error_of(plain, updates)["m0"] + 1e-5


def test_flora_na_of_no_steps_is_fedavg() -> None:
    for ours, theirs in zip(rounds_of(built("flora-na", steps=0)), rounds_of(built("fedavg")), strict=True):
        for name, tensor in theirs[2]["adapter"].items():
            torch.testing.assert_close(ours[2]["adapter"][name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clients", [1, 3])
def test_flora_na_leaves_equal_adapters_as_they_are(clients: int) -> None:
    """Any weights of sum 1 are as good, so they stay."""
    adapter = random_adapter(0, layers=2)
    equal = [update(c, clone(adapter), c + 1) for c in range(clients)]
    found = built("flora-na").aggregate({"adapter": adapter}, equal, round_info())["adapter"]
    for name, tensor in adapter.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_flora_na_survives_a_round_in_which_nothing_was_learnt() -> None:
    """With B = 0 every error is 0, and least squares alone would set A to 0 as well, for good."""
    start = lora_adapter()
    moved = add(start, {n: torch.full_like(t, 0.0 if n.endswith(B) else 0.1) for n, t in start.items()})
    found = built("flora-na").aggregate({"adapter": start}, [update(c, moved) for c in CLIENTS], round_info())["adapter"]
    for name, tensor in moved.items():
        torch.testing.assert_close(found[name], tensor)


# What they can be combined with

PROPERTIES = {"fedmomentum": (None, True, True), "flora-na": (None, False, False)}


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties(name: str) -> None:
    algorithm = built(name)
    assert (algorithm.averages, algorithm.unequal_ranks, algorithm.refactors) == PROPERTIES[name]
    assert algorithm.needs_lora
    assert not algorithm.personal


@pytest.mark.parametrize(("name", "options", "sentence"), [
    ("fedmomentum", {"energy": 1.01}, "energy = 1.01 must be at least 0 and at most 1"),
    ("fedmomentum", {"energy": -1.0}, "energy = -1.0 must be"),
    ("flora-na", {"steps": -1}, "steps = -1 must not be negative"),
])  # fmt: skip
def test_options_out_of_range_are_refused(name: str, options: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        built(name, **options)
