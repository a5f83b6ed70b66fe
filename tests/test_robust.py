"""Robust aggregation against plain loops, its identities, its breakdown points, and how it takes the place of the mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.algorithms import Update
from fedmllm.algorithms.combining import Combined
from fedmllm.algorithms.factors import A, B, modules
from fedmllm.algorithms.fedavg import fedavg
from fedmllm.algorithms.robust.by_distance import krum_scores, squared_distances
from fedmllm.algorithms.robust.estimates import Changes
from fedmllm.tensors import State
from helpers import a_round, lora_adapter, quick, round_info, same, update
from robust_rounds import METHODS, robust

Matrix = np.ndarray[Any, np.dtype[np.float64]]

SENT = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.5], [0.25], [0.0]])}


def combine(
    name: str,
    changes: Matrix,
    examples: Sequence[int] = (),
    state: State | None = None,
    weighting: Any = "examples",
    **options: Any,
) -> Combined:
    """A round in which client k changed the five numbers of `SENT` by row k."""
    updates = []
    for client, row in enumerate(np.asarray(changes, np.float32)):
        parts = {"a": torch.from_numpy(row[:2].copy()), "b": torch.from_numpy(row[2:].copy()).view(3, 1)}
        adapter = {n: SENT[n] + parts[n] for n in SENT}
        updates.append(update(client, adapter, examples=examples[client] if len(examples) else 1))
    info = round_info(sampled=range(len(updates)))
    return robust(name, **options).combine(updates, fedavg(weighting=weighting), state or {"adapter": SENT}, info)


def vector(update: Update) -> Matrix:
    """The change of an update, as one vector."""
    adapter = update.groups["adapter"]
    return torch.cat([(adapter[n].double() - SENT[n].double()).flatten() for n in SENT]).numpy()


def estimate(name: str, changes: Matrix, examples: Sequence[int] = (), **options: Any) -> Matrix:
    """The mean change that the algorithm sees."""
    combined = combine(name, changes, examples, **options)
    weights = [u.examples for u in combined.updates]
    return np.average([vector(u) for u in combined.updates], axis=0, weights=weights)


# The same by plain loops


def naive_trimmed(x: Matrix, p: Matrix, cut: int) -> Matrix:
    return np.array([np.mean(sorted(column)[cut : len(column) - cut]) for column in x.T])


def naive_median(x: Matrix, p: Matrix) -> Matrix:
    return np.median(x, axis=0)


def naive_krum(x: Matrix, p: Matrix, f: int, m: int) -> Matrix:
    n, scores = len(x), []
    for i in range(n):
        distances = sorted(sum((a - b) ** 2 for a, b in zip(x[i], x[j], strict=True)) for j in range(n) if j != i)
        scores.append(sum(distances[: max(1, n - f - 2)]))
    best = sorted(range(n), key=lambda i: scores[i])[:m]
    return np.mean([x[i] for i in best], axis=0)


def naive_geometric_median(x: Matrix, p: Matrix) -> Matrix:
    z = np.average(x, axis=0, weights=p)
    for _ in range(5000):
        z = np.average(x, axis=0, weights=p / np.maximum(1e-5, np.linalg.norm(x - z, axis=1)))
    return z


def naive_norm_clip(x: Matrix, p: Matrix, bound: float) -> Matrix:
    clipped = [row * min(1.0, bound / float(np.linalg.norm(row))) for row in x]
    return np.average(clipped, axis=0, weights=p)


def naive_centered_clip(x: Matrix, p: Matrix, bound: float, iterations: int) -> Matrix:
    v = np.zeros(x.shape[1])
    for _ in range(iterations):
        v = v + sum(w * (row - v) * min(1.0, bound / float(np.linalg.norm(row - v))) for w, row in zip(p, x, strict=True))
    return v


NAIVE: list[tuple[str, dict[str, Any], Callable[[Matrix, Matrix], Matrix]]] = [
    ("median", {}, naive_median),
    ("trimmed-mean", {"share": 0.2}, lambda x, p: naive_trimmed(x, p, len(x) // 5)),
    ("trimmed-mean", {"share": 0.4}, lambda x, p: naive_trimmed(x, p, 2 * len(x) // 5)),
    ("krum", {"attackers": 2}, lambda x, p: naive_krum(x, p, min(2, (len(x) - 3) // 2), 1)),
    ("multi-krum", {"attackers": 1, "select": 3}, lambda x, p: naive_krum(x, p, 1, 3)),
    ("multi-krum", {"attackers": 1}, lambda x, p: naive_krum(x, p, 1, len(x) - 1)),
    ("geometric-median", {}, naive_geometric_median),
    ("norm-clip", {"bound": 0.7}, lambda x, p: naive_norm_clip(x, p, 0.7)),
    ("norm-clip", {}, lambda x, p: naive_norm_clip(x, p, float(np.median(np.linalg.norm(x, axis=1))))),
    ("norm-clip", {"factor": 0.5}, lambda x, p: naive_norm_clip(x, p, float(np.median(np.linalg.norm(x, axis=1))) / 2)),
    ("centered-clip", {"bound": 0.7, "iterations": 4}, lambda x, p: naive_centered_clip(x, p, 0.7, 4)),
    ("centered-clip", {}, lambda x, p: naive_centered_clip(x, p, float(np.median(np.linalg.norm(x, axis=1))), 1)),
]


@pytest.mark.parametrize("n", [5, 6, 11])
@pytest.mark.parametrize(("name", "options", "naive"), NAIVE, ids=[f"{name}-{options}" for name, options, _ in NAIVE])
def test_every_estimate_is_that_of_a_plain_loop(
    name: str, options: dict[str, Any], naive: Callable[[Matrix, Matrix], Matrix], n: int
) -> None:
    rng = np.random.default_rng(n)
    changes = rng.normal(size=(n, 5)).astype(np.float32).astype(np.float64)
    changes[0] *= 30
    examples = rng.integers(1, 9, n).tolist()
    expected = naive(changes, np.array(examples) / sum(examples))
    assert estimate(name, changes, examples, **options) == pytest.approx(expected, rel=1e-5, abs=3e-6)


def test_clipping_is_around_the_estimate_of_the_round_before() -> None:
    changes = np.array([[3.0, 4.0, 0, 0, 0], [0, 0, 0, 0, 0]])
    first = combine("centered-clip", changes, bound=1.0)
    assert vector(first.updates[0]) == pytest.approx([0.3, 0.4, 0, 0, 0])  # half of (3, 4) / 5
    second = combine("centered-clip", changes, bound=1.0, state={"adapter": SENT, **first.state})
    # (3, 4) is 4.5 from (0.3, 0.4), of which 1 counts; (0, 0) is 0.5 from it, all of which counts.
    assert vector(second.updates[0]) == pytest.approx([0.45, 0.6, 0, 0, 0])
    assert second.kept == pytest.approx({0: 1 / 4.5, 1: 1.0})


def test_distances_of_products_are_those_of_the_dense_matrices() -> None:
    whole = lora_adapter(layers=2)
    rng = torch.Generator().manual_seed(0)
    uploads = [{n: t + torch.randn(t.shape, generator=rng) for n, t in whole.items()} for _ in range(4)]
    for sent in (whole, {n: t for n, t in whole.items() if n.endswith(B)}):  # FFA-LoRA sends B alone
        sending = [{n: upload[n] for n in sent} for upload in uploads]
        dense = []
        for upload in sending:
            both = {**whole, **upload}
            dense.append(torch.cat([(both[m + B].double() @ both[m + A].double()).flatten() for m in modules(both)]))
        changes = Changes(sending, sent, torch.full((4,), 0.25), {}, whole)
        expected = [[float((x - y).square().sum()) for y in dense] for x in dense]
        assert squared_distances(changes.gram("product")).tolist() == [pytest.approx(row, abs=1e-9) for row in expected]


@pytest.mark.parametrize("name", ["krum", "multi-krum", "geometric-median"])
def test_on_products_a_change_may_be_in_either_factor(name: str) -> None:
    """(A / c, B c) is the same model as (A, B): an honest client that divides its change in another way is not far away."""
    algorithm, info = fedavg(), round_info(sampled=range(5))
    state = algorithm.init(lora_adapter())
    updates = a_round(algorithm, state, {}, info)
    for on in ("product", "factors"):
        method = robust(name, on=on)
        kept = method.combine(updates, algorithm, state, info).kept
        best = max(kept, key=lambda client: kept[client])
        divided = {n: t * (50.0 if n.endswith(B) else 0.02) for n, t in updates[best].groups["adapter"].items()}
        others = [replace(u, groups={"adapter": divided}) if u.client == best else u for u in updates]
        after = method.combine(others, algorithm, state, info).kept
        assert (after == pytest.approx(kept, abs=1e-4)) == (on == "product")
        assert (after[best] < 0.5) == (on == "factors")


# Identities

ROWS = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(st.floats(-10, 10, width=32), min_size=5, max_size=5), min_size=n, max_size=n)
)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("trimmed-mean", {"share": 0.0}),
        ("norm-clip", {"bound": 1e300}),
        ("centered-clip", {"bound": 1e300}),
        ("multi-krum", {"attackers": 0}),
        ("geometric-median", {"smoothing": 1e300}),
    ],
)
@given(rows=ROWS)
@quick
def test_a_method_that_excludes_nothing_is_the_mean(name: str, options: dict[str, Any], rows: list[list[float]]) -> None:
    changes = np.array(rows)
    assert estimate(name, changes, **options) == pytest.approx(changes.mean(axis=0), abs=1e-5)
    assert set(combine(name, changes, **options).kept.values()) == {1.0}


@pytest.mark.parametrize("name", METHODS)
@given(row=st.lists(st.floats(-10, 10, width=32), min_size=5, max_size=5), n=st.integers(1, 9))
@quick
def test_equal_updates_and_a_single_one_are_kept(name: str, row: list[float], n: int) -> None:
    options = {"bound": 100.0} if name.endswith("clip") else {}  # the first centre is 0, not the updates' own
    assert estimate(name, np.array([row] * n), **options) == pytest.approx(np.array(row), abs=1e-5)
    kept = list(combine(name, np.array([row] * n), **options).kept.values())
    assert kept == pytest.approx([1.0] * n if name not in ("krum", "multi-krum") else kept)


@pytest.mark.parametrize("name", METHODS)
@given(rows=ROWS, seed=st.integers(0, 99))
@quick
def test_the_order_of_updates_does_not_matter(name: str, rows: list[list[float]], seed: int) -> None:
    info, algorithm, state = round_info(sampled=range(len(rows))), fedavg(), {"adapter": SENT}
    updates = combine("norm-clip", np.array(rows), bound=1e300).updates
    shuffled = [updates[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    one, other = (robust(name).combine(some, algorithm, state, info) for some in (updates, shuffled))
    assert {u.client: u.groups for u in one.updates}.keys() == {u.client: u.groups for u in other.updates}.keys()
    assert same(algorithm.aggregate(state, one.updates, info), algorithm.aggregate(state, other.updates, info))
    assert one.kept == other.kept


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_tensors_does_not_matter(name: str) -> None:
    """Bit for bit: what comes from a file or over a network has the tensors in another order."""
    adapter, info, algorithm = lora_adapter(), round_info(sampled=range(7)), fedavg()
    noise = np.random.default_rng(0).normal(size=(7, sum(t.numel() for t in adapter.values()))).astype(np.float32)
    pieces = [torch.from_numpy(row).split([t.numel() for t in adapter.values()]) for row in noise]
    changed = [{n: t + piece.view_as(t) for (n, t), piece in zip(adapter.items(), p, strict=True)} for p in pieces]
    reverse = [dict(reversed(tensors.items())) for tensors in changed]
    there, back = (
        robust(name).combine([update(c, tensors) for c, tensors in enumerate(uploads)], algorithm, {"adapter": adapter}, info)
        for uploads in (changed, reverse)
    )
    assert all(same(a.groups, b.groups) for a, b in zip(there.updates, back.updates, strict=True))
    assert there.kept == back.kept


# Breakdown


BREAKDOWN: list[tuple[str, dict[str, Any], int, int]] = [
    # method, options, clients, attackers: the most that it withstands
    ("median", {}, 11, 5),
    ("median", {}, 10, 4),
    ("trimmed-mean", {"share": 0.4}, 10, 4),
    ("trimmed-mean", {"share": 0.2}, 10, 2),
    ("krum", {"attackers": 4}, 11, 4),
    ("multi-krum", {"attackers": 4}, 11, 4),
    ("geometric-median", {}, 11, 5),
    ("norm-clip", {}, 11, 5),
    ("centered-clip", {}, 11, 5),
]
EXTREMES: Mapping[str, Callable[[Matrix], Matrix]] = {
    "scaled": lambda honest: 1e6 * honest,
    "opposite": lambda honest: -1e6 * honest,
    "one place": lambda honest: np.full_like(honest, 1e6),
    "large": lambda honest: np.full_like(honest, 1e30),
    "scattered": lambda honest: 1e6 * np.random.default_rng(1).normal(size=honest.shape),
}


@pytest.mark.parametrize("attack", EXTREMES)
@pytest.mark.parametrize(("name", "options", "clients", "attackers"), BREAKDOWN)
def test_below_the_breakdown_point_the_estimate_stays_with_the_honest(
    name: str, options: dict[str, Any], clients: int, attackers: int, attack: str
) -> None:
    changes = np.random.default_rng(0).normal(size=(clients, 5))
    changes[:attackers] = EXTREMES[attack](changes[:attackers])
    honest = changes[attackers:]
    result = estimate(name, changes, **options)
    radius = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    if name in ("median", "trimmed-mean"):  # within the honest values of each entry
        assert (honest.min(axis=0) - 1e-6 <= result).all()
        assert (result <= honest.max(axis=0) + 1e-6).all()
    elif name.endswith("clip"):  # no longer than the longest honest one
        assert np.linalg.norm(result) <= np.linalg.norm(honest, axis=1).max()
    elif name == "geometric-median":  # C_α times the honest radius, α = 5/11 (1912.13445)
        assert np.linalg.norm(result - honest.mean(axis=0)) <= 2 * (1 - 5 / 11) / (1 - 10 / 11) * radius
    elif name == "krum":
        assert any(result == pytest.approx(row, abs=1e-5) for row in honest)
    else:
        assert np.linalg.norm(result - honest.mean(axis=0)) <= radius
    kept = combine(name, changes, **options).kept
    assert max(kept[client] for client in range(attackers)) < 0.01 or name in ("median", "trimmed-mean")


@pytest.mark.parametrize("name", ["none", *METHODS])
def test_one_attacker_moves_the_mean_and_no_method(name: str) -> None:
    changes = np.random.default_rng(0).normal(size=(11, 5))
    without = changes[1:].mean(axis=0)
    changes[0] = 1e6
    moved = changes.mean(axis=0) if name == "none" else estimate(name, changes)
    assert (np.abs(moved - without).max() > 1e4) == (name == "none")


def test_a_round_of_few_updates_assumes_fewer_attackers() -> None:
    for n in range(1, 7):
        changes = np.random.default_rng(n).normal(size=(n, 5)).astype(np.float32).astype(np.float64)
        f = max(0, (n - 3) // 2)
        uniform = np.full(n, 1 / n)
        assert estimate("krum", changes, attackers=4) == pytest.approx(naive_krum(changes, uniform, f, 1), abs=1e-5)
        many = estimate("multi-krum", changes, attackers=4, select=5)
        assert many == pytest.approx(naive_krum(changes, uniform, f, min(5, n - f)), abs=1e-5)
        assert estimate("trimmed-mean", changes, share=0.49) == pytest.approx(
            naive_trimmed(changes, uniform, min(int(0.49 * n), (n - 1) // 2)), abs=1e-5
        )


def test_krum_scores_by_hand() -> None:
    points = np.array([0.0, 1.0, 3.0, 7.0, 100.0])
    gram = torch.tensor(np.outer(points, points))
    assert krum_scores(gram, 1).tolist() == [1 + 9, 1 + 4, 4 + 9, 16 + 36, 93**2 + 97**2]


# What is kept


def test_what_is_kept_of_each_update() -> None:
    line = np.array([[0.0] * 5, [1.0] * 5, [2.0] * 5, [3.0] * 5, [40.0] * 5])
    assert combine("median", line).kept == {0: 0, 1: 0, 2: 1, 3: 0, 4: 0}
    assert combine("trimmed-mean", line, share=0.2).kept == {0: 0, 1: 1, 2: 1, 3: 1, 4: 0}
    assert combine("multi-krum", line, attackers=1).kept == {0: 1, 1: 1, 2: 1, 3: 1, 4: 0}
    assert combine("krum", line, attackers=1).kept == {0: 0, 1: 1, 2: 0, 3: 0, 4: 0}
    clipped = combine("norm-clip", line).kept
    assert clipped == pytest.approx({0: 1, 1: 1, 2: 1, 3: 2 / 3, 4: 0.05})
    geometric = combine("geometric-median", line).kept
    assert geometric[2] == 1.0
    assert geometric[4] < 0.01


def test_kept_is_relative_to_the_share_of_an_update_like_all_others() -> None:
    """Of clients that differ by chance only, none keeps less than the others, however many values a method leaves out."""
    changes = np.random.default_rng(0).normal(size=(4, 5))
    rows = np.concatenate([changes, -changes])  # each value is once low and once high
    for share in (0.125, 0.25, 0.375):
        kept = combine("trimmed-mean", rows, share=share).kept
        assert np.mean(list(kept.values())) > 0.5


def test_of_equal_values_each_has_the_same_share() -> None:
    same_changes = np.array([[0.0] * 5] * 3 + [[5.0] * 5])
    assert combine("median", same_changes).kept == pytest.approx({0: 1, 1: 1, 2: 1, 3: 0})
    assert combine("trimmed-mean", same_changes, share=0.25).kept == pytest.approx({0: 1, 1: 1, 2: 1, 3: 0})


def test_weights_by_samples_count_where_the_method_has_weights() -> None:
    changes = np.array([[0.0] * 5, [0.0] * 5, [10.0] * 5])
    heavy = [1, 1, 100]
    assert estimate("geometric-median", changes, heavy) == pytest.approx([10.0] * 5, abs=1e-3)
    assert estimate("geometric-median", changes, heavy, weighting="uniform") == pytest.approx([0.0] * 5, abs=1e-3)
    assert combine("geometric-median", np.ones((3, 5)), heavy).kept == pytest.approx({0: 1, 1: 1, 2: 1})
    for name in ("median", "trimmed-mean", "krum", "multi-krum"):
        options = {"share": 0.34} if name == "trimmed-mean" else {}
        assert estimate(name, changes, heavy, **options) == pytest.approx(estimate(name, changes, **options))
