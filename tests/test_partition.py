from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmllm.data.min_samples import ensure_minimum
from fedmllm.data.partitions import partitions
from fedmllm.data.samples import Sample
from fedmllm.errors import ConfigError, DataError
from fedmllm.rng import stream
from helpers import mixed, quick, sample
from twins import by_source as plain_by_source
from twins import dirichlet as plain_dirichlet
from twins import ensure_minimum as plain_minimum

every_partition = pytest.mark.parametrize("name", partitions.names())


def dealt(name: str, samples: Sequence[Sample], clients: Sequence[int], seed: int = 0, **options: float) -> list[int]:
    owner: list[int] = partitions.build(name, options)(samples, clients, stream(seed, "test")).tolist()
    return owner


def of_sources(*sizes: int) -> list[Sample]:
    return [sample(f"{name}{i}", source=name) for name, size in zip("abcdefgh", sizes, strict=False) for i in range(size)]


@every_partition
@quick
@given(
    count=st.integers(1, 60), clients=st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True), seed=st.integers(0, 5)
)
def test_each_sample_goes_to_one_of_the_clients_that_may_hold_it(name: str, count: int, clients: list[int], seed: int) -> None:
    owner = dealt(name, mixed(count), sorted(clients), seed)
    assert len(owner) == count
    assert set(owner) <= set(clients)
    assert owner == dealt(name, mixed(count), sorted(clients), seed)


@pytest.mark.parametrize("name", ["iid", "dirichlet"])
def test_the_seed_changes_the_partition(name: str) -> None:
    assert dealt(name, mixed(60), range(5)) != dealt(name, mixed(60), range(5), seed=1)


@quick
@given(count=st.integers(0, 60), clients=st.integers(1, 9))
def test_iid_sizes_differ_by_at_most_one(count: int, clients: int) -> None:
    held = Counter(dealt("iid", mixed(count), range(clients)))
    assert max(held[c] for c in range(clients)) - min(held[c] for c in range(clients)) <= 1


def test_iid_as_its_docstring_says() -> None:
    assert sorted(Counter(dealt("iid", mixed(10), range(3))).values()) == [3, 3, 4]


def test_dirichlet_skews_labels_more_for_smaller_alpha() -> None:
    samples = [sample(f"{i:04d}", label=str(i % 2)) for i in range(3000)]

    def largest_share(alpha: float) -> float:
        shares = []
        for seed in range(5):
            owner = dealt("dirichlet", samples, range(3), seed, alpha=alpha)
            shares += [max(Counter(owner[k::2]).values()) / 1500 for k in range(2)]
        return float(np.mean(shares))

    assert largest_share(1000) == pytest.approx(1 / 3, abs=0.03)
    assert largest_share(0.05) > 0.8


def test_dirichlet_distributes_each_label_separately() -> None:
    # Samples of a later label do not change the draw of an earlier label.
    first = [sample(f"a{i}", label="a") for i in range(40)]
    alone = dealt("dirichlet", first, range(4))
    together = dealt("dirichlet", [*first, *(sample(f"b{i}", label="b") for i in range(40))], range(4))
    assert together[:40] == alone


def test_labels_differ_by_any_character() -> None:
    # numpy's text arrays drop zero bytes at the end.
    samples = [sample(str(i), label="a" if i % 2 else "a\0") for i in range(100)]
    owner = dealt("dirichlet", samples, range(2), alpha=0.001)
    assert len(set(owner[::2])) == len(set(owner[1::2])) == 1


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_dirichlet_needs_a_positive_alpha(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"^partition"):
        partitions.build("dirichlet", {"alpha": alpha})


def test_a_negative_minimum_per_label_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_per_label = -1 must not be negative"):
        partitions.build("dirichlet", {"min_per_label": -1})


@quick
@given(
    labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=80),
    clients=st.lists(st.integers(0, 20), min_size=1, max_size=9, unique=True).map(sorted),
    alpha=st.sampled_from([1e-3, 0.5, 100.0]),
    least=st.integers(0, 4),
    seed=st.integers(0, 5),
)
def test_every_client_gets_its_minimum_of_each_label(
    labels: list[str], clients: list[int], alpha: float, least: int, seed: int
) -> None:
    samples = [sample(str(i), label=label) for i, label in enumerate(labels)]
    owner = dealt("dirichlet", samples, clients, seed, alpha=alpha, min_per_label=least)
    free = dealt("dirichlet", samples, clients, seed, alpha=alpha)
    assert set(owner) <= set(clients)
    for label in set(labels):
        held, unforced = (Counter(c for c, own in zip(by, labels, strict=True) if own == label) for by in (owner, free))
        expected = min(least, labels.count(label) // len(clients))
        assert min(held[client] for client in clients) >= expected
        if min(unforced[client] for client in clients) >= expected:
            assert held == unforced
        else:  # no more are moved than are needed
            assert min(held[client] for client in clients) == expected
            gained = sum((held - unforced).values())
            assert gained == sum(max(0, expected - unforced[client]) for client in clients)


@quick
@given(sizes=st.lists(st.integers(1, 9), min_size=3, max_size=8), clients=st.integers(1, 3))
def test_by_source_keeps_a_source_together_and_spreads_the_load(sizes: list[int], clients: int) -> None:
    samples = of_sources(*sizes)
    owner = dealt("by-source", samples, range(clients))
    for name in {s.source for s in samples}:
        assert len({client for s, client in zip(samples, owner, strict=True) if s.source == name}) == 1
    held = Counter(owner)
    assert set(held) == set(range(clients))
    assert max(held.values()) - min(held.values()) <= max(sizes)


def test_by_source_with_few_sources_gives_each_source_clients_by_size() -> None:
    samples = of_sources(40, 20)
    owner = dealt("by-source", samples, [3, 5, 6, 7, 8, 9])
    by_source = [Counter(owner[:40]), Counter(owner[40:])]
    assert by_source[0].keys().isdisjoint(by_source[1])
    assert [sorted(held.values()) for held in by_source] == [[10, 10, 10, 10], [10, 10]]


@quick
@given(
    labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=60),
    clients=st.lists(st.integers(0, 99), min_size=1, max_size=40, unique=True).map(sorted),
    alpha=st.sampled_from([1e-3, 0.1, 0.5, 1.0, 100.0]),
    seed=st.integers(0, 9),
)
def test_dirichlet_equals_its_plain_twin(labels: list[str], clients: list[int], alpha: float, seed: int) -> None:
    samples = [sample(str(i), label=label) for i, label in enumerate(labels)]
    expected = plain_dirichlet(samples, clients, stream(seed, "test"), alpha)
    assert dealt("dirichlet", samples, clients, seed, alpha=alpha) == expected


@quick
@given(
    sources=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60),
    clients=st.lists(st.integers(0, 99), min_size=1, max_size=40, unique=True).map(sorted),
    seed=st.integers(0, 9),
)
def test_by_source_equals_its_plain_twin(sources: list[str], clients: list[int], seed: int) -> None:
    samples = [sample(str(i), source=source) for i, source in enumerate(sources)]
    assert dealt("by-source", samples, clients, seed) == plain_by_source(samples, clients, stream(seed, "test"))


# The minimum number of samples


@st.composite
def holdings(draw: st.DrawFn) -> tuple[np.ndarray, list[frozenset[int]], int, int]:
    """(owners, who may hold each sample, clients, least): only a few samples more than needed, so that chains occur."""
    clients, least = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    kinds = draw(st.lists(st.frozensets(st.integers(0, clients - 1), min_size=1), min_size=1, max_size=5))
    count = clients * least + draw(st.integers(0, 8))
    eligible = [draw(st.sampled_from(kinds)) for _ in range(count)]
    owner = [draw(st.sampled_from(sorted(able))) for able in eligible]
    return np.array(owner, dtype=np.int64), eligible, clients, least


@settings(quick, max_examples=300)
@given(case=holdings(), seed=st.integers(0, 9))
def test_the_minimum_equals_its_plain_twin(case: tuple[np.ndarray, list[frozenset[int]], int, int], seed: int) -> None:
    try:
        expected = plain_minimum(*case, stream(seed, "test")).tolist()
    except DataError as error:
        with pytest.raises(DataError, match=str(error).partition(" be given")[0]):
            ensure_minimum(*case, stream(seed, "test"))
        return
    assert ensure_minimum(*case, stream(seed, "test")).tolist() == expected


def test_the_minimum_is_fast_if_nearly_every_client_lacks_samples() -> None:
    """Ten thousand clients, of which one holds nearly all: each looks up a constant number of times whether it may hold a
    kind, not once per sample."""
    lookups = 0

    class Counted(frozenset[int]):
        def __contains__(self, client: object) -> bool:
            nonlocal lookups
            lookups += 1
            return super().__contains__(client)

    clients, texts, pictures = 10_000, Counted(range(0, 10_000)), Counted(range(5_000, 10_000))
    eligible = [texts] * clients + [pictures] * clients
    owner = np.array([9_999] * len(eligible), dtype=np.int64)
    moved = ensure_minimum(owner, eligible, clients, 2, stream(0, "test"))
    assert set(Counter(moved.tolist()).values()) == {2}
    assert lookups < 20 * clients


@quick
@given(
    owners=st.lists(st.integers(0, 5), min_size=6, max_size=40),
    least=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_every_client_reaches_the_minimum_and_nothing_is_dropped(owners: list[int], least: int, seed: int) -> None:
    owner = np.array(owners, dtype=np.int64)
    anyone = [frozenset(range(6))] * len(owner)
    if 6 * least > len(owner):
        with pytest.raises(DataError, match=rf"needs {6 * least} samples and there are {len(owner)}"):
            ensure_minimum(owner, anyone, 6, least, stream(seed, "test"))
        return
    moved = ensure_minimum(owner, anyone, 6, least, stream(seed, "test"))
    assert owner.tolist() == owners
    held, before = Counter(moved.tolist()), Counter(owners)
    assert all(held[c] >= least for c in range(6))
    # A client with enough gives away at most its surplus; one with too few takes no more than it lacks.
    assert all(held[c] <= max(before[c], least) for c in range(6))
    assert int((moved != owner).sum()) == sum(max(0, least - before[c]) for c in range(6))


def test_a_client_gets_only_samples_that_it_may_hold() -> None:
    owner = np.zeros(6, dtype=np.int64)
    eligible = [frozenset((0, 1))] * 2 + [frozenset((0, 2))] * 4
    moved = ensure_minimum(owner, eligible, 3, 2, stream(0, "test")).tolist()
    assert Counter(moved) == {0: 2, 1: 2, 2: 2}
    assert all(client in able for client, able in zip(moved, eligible, strict=True))


def test_samples_are_passed_on_along_a_chain() -> None:
    # Client 0 needs a text. Client 1 holds the only one and nothing else, but can take an image from client 2 instead.
    text, picture = frozenset((0, 1)), frozenset((1, 2))
    moved = ensure_minimum(np.array([1, 2, 2]), [text, picture, picture], 3, 1, stream(0, "test")).tolist()
    assert moved[0] == 0
    assert sorted(moved) == [0, 1, 2]


@quick
@given(
    texts=st.integers(0, 8), pictures=st.integers(0, 8), kinds=st.lists(st.sampled_from("tpb"), min_size=1, max_size=5),
    least=st.integers(1, 3), seed=st.integers(0, 9),
)  # fmt: skip
def test_the_minimum_is_reached_whenever_possible(texts: int, pictures: int, kinds: list[str], least: int, seed: int) -> None:
    can = {kind: frozenset(c for c, k in enumerate(kinds) if k in (kind, "b")) for kind in "tp"}
    eligible = [can["t"]] * texts + [can["p"]] * pictures
    if not all(eligible):
        return
    rng = stream(seed, "test")
    owner = np.array([rng.choice(sorted(able)) for able in eligible], dtype=np.int64)
    # Hall's condition: the samples suffice for the clients of each kind alone, and for all clients together.
    enough = (
        least * kinds.count("t") <= texts and least * kinds.count("p") <= pictures and least * len(kinds) <= texts + pictures
    )
    if not enough:
        with pytest.raises(DataError):
            ensure_minimum(owner, eligible, len(kinds), least, rng)
        return
    moved = ensure_minimum(owner, eligible, len(kinds), least, rng).tolist()
    assert all(Counter(moved)[c] >= least for c in range(len(kinds)))
    assert all(client in able for client, able in zip(moved, eligible, strict=True))


def test_a_client_that_cannot_be_served_is_named() -> None:
    with pytest.raises(DataError, match="client 1 cannot be given min_samples = 1 samples that it may hold"):
        ensure_minimum(np.zeros(4, dtype=np.int64), [frozenset((0,))] * 4, 2, 1, stream(0, "test"))
