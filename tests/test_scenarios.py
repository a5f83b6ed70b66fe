from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.data.samples import MODALITIES
from fedmllm.data.scenarios import BOTH, scenarios
from fedmllm.errors import ConfigError
from fedmllm.rng import stream
from helpers import quick, sample

kinds = st.sampled_from(["both", "image", "text", "none"])


def visible(name: str, kind: str = "both", seed: int = 0, **options: object) -> frozenset[str]:
    return scenarios.build(name, options).visible(sample("s", kind), 0, stream(seed, "test"))


def clients_of(name: str, number: int, seed: int = 0, **options: object) -> list[frozenset[str]]:
    return list(scenarios.build(name, options).clients(number, stream(seed, "test")))


@pytest.mark.parametrize("name", scenarios.names())
@quick
@given(kind=kinds, number=st.integers(1, 12), seed=st.integers(0, 9))
def test_every_scenario_keeps_the_contract(name: str, kind: str, number: int, seed: int) -> None:
    clients = clients_of(name, number, seed)
    assert len(clients) == number
    assert all(has and has <= BOTH for has in clients)
    assert clients == clients_of(name, number, seed)
    assert visible(name, kind, seed) <= sample("s", kind).modalities
    assert visible(name, kind, seed) == visible(name, kind, seed)


def test_aligned_hides_nothing() -> None:
    assert clients_of("aligned", 3) == [BOTH] * 3
    assert visible("aligned") == BOTH


# missing


@quick
@given(kind=st.sampled_from(["both", "image", "text"]), rate=st.floats(0, 0.99), seed=st.integers(0, 1000))
def test_missing_never_yields_an_empty_sample(kind: str, rate: float, seed: int) -> None:
    assert visible("missing", kind, seed, rate=rate)


def test_missing_removes_each_modality_at_its_rate() -> None:
    drawn = Counter(visible("missing", seed=seed, rate=0.3, never_empty=False) for seed in range(4000))
    share = {seen: count / 4000 for seen, count in drawn.items()}
    # Independently with probability 0.3: both stay in 0.7², one of them in 0.7·0.3, none in 0.3².
    assert share[BOTH] == pytest.approx(0.49, abs=0.025)
    for modality in MODALITIES:
        assert share[frozenset((modality,))] == pytest.approx(0.21, abs=0.025)
    assert share[frozenset()] == pytest.approx(0.09, abs=0.025)


def test_missing_repeats_the_draw_for_empty_samples() -> None:
    drawn = Counter(visible("missing", seed=seed, rate=0.3) for seed in range(4000))
    assert drawn[BOTH] / 4000 == pytest.approx(0.49 / 0.91, abs=0.025)


def test_missing_can_empty_samples_if_allowed() -> None:
    drawn = Counter(visible("missing", "text", seed, rate=0.5, never_empty=False) for seed in range(400))
    assert drawn.keys() == {frozenset(), frozenset(("text",))}
    assert drawn[frozenset()] / 400 == pytest.approx(0.5, abs=0.1)


def test_missing_draws_the_image_independently_of_the_text() -> None:
    for seed in range(50):
        paired = visible("missing", "both", seed, rate=0.5, never_empty=False)
        alone = visible("missing", "image", seed, rate=0.5, never_empty=False)
        assert alone == paired & {"image"}


# cross


@pytest.mark.parametrize(
    ("image_clients", "number", "expected"),
    [(3, 10, 3), (0.3, 10, 3), (0.5, 4, 2), (1, 10, 1), (1.0, 10, 10), (0, 3, 0), (0.0, 3, 0)],
)
def test_cross_gives_each_client_one_modality(image_clients: float, number: int, expected: int) -> None:
    counts = Counter(clients_of("cross", number, image_clients=image_clients))
    assert counts[frozenset(("image",))] == expected
    assert counts[frozenset(("text",))] == number - expected


def test_cross_draws_which_clients_from_the_seed() -> None:
    assert len({tuple(clients_of("cross", 10, seed)) for seed in range(10)}) > 5


def test_cross_with_more_image_clients_than_clients_is_refused() -> None:
    with pytest.raises(ValueError, match="image_clients = 11 is more than the number of clients, 10"):
        clients_of("cross", 10, image_clients=11)


# hybrid


def test_hybrid_mixes_clients_by_presence() -> None:
    counts = Counter(clients_of("hybrid", 4000, presence=0.6))
    # 0.6² have both; of the 0.4² that would have none a coin gives half to each.
    assert counts[BOTH] / 4000 == pytest.approx(0.36, abs=0.03)
    for modality in MODALITIES:
        assert counts[frozenset((modality,))] / 4000 == pytest.approx(0.24 + 0.08, abs=0.03)


def test_hybrid_at_the_limits_of_presence() -> None:
    assert clients_of("hybrid", 20, presence=1.0) == [BOTH] * 20
    assert Counter(map(len, clients_of("hybrid", 20, presence=0.0))) == {1: 20}


def test_hybrid_clients_do_not_depend_on_how_many_follow() -> None:
    assert clients_of("hybrid", 30)[:10] == clients_of("hybrid", 10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("missing", {"rate": 1.0}),
        ("missing", {"rate": -0.1}),
        ("missing", {"rate": float("nan")}),
        ("missing", {"never_empty": 1}),
        ("cross", {"image_clients": -1}),
        ("cross", {"image_clients": 1.5}),
        ("cross", {"image_clients": float("nan")}),
        ("cross", {"image_clients": True}),
        ("hybrid", {"presence": 1.1}),
        ("hybrid", {"presence": -0.1}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"^scenario"):
        scenarios.build(name, options)
