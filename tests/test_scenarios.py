from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.data.scenarios import BOTH, IMAGE, NONE, TEXT, Modalities, scenarios
from fedmllm.data.summary import PATTERNS
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
    assert all(has <= BOTH and (has or scenarios.build(name, {}).coin_per_sample) for has in clients)
    assert clients == clients_of(name, number, seed)
    assert visible(name, kind, seed) <= sample("s", kind).modalities
    assert visible(name, kind, seed) == visible(name, kind, seed)


def test_aligned_hides_nothing() -> None:
    assert clients_of("aligned", 3) == [BOTH] * 3
    assert visible("aligned") == BOTH


# missing

RULES = {
    "keep": {"both": 0.36, "image": 0.24, "text": 0.24, "none": 0.16},
    "redraw": {"both": 0.36 / 0.84, "image": 0.24 / 0.84, "text": 0.24 / 0.84, "none": 0},
    "drop": {"both": 0.36, "image": 0.24, "text": 0.24, "none": 0},
}
"""What a sample with both modalities shows at a rate of 0.4: 0.6², 0.6 · 0.4 twice, and 0.4² for none, which is dropped or
divided among the others."""


@pytest.mark.parametrize("empty", RULES)
def test_missing_removes_each_modality_at_its_rate(empty: str) -> None:
    scenario = scenarios.build("missing", {"rate": 0.4, "empty": empty})
    drawn: Counter[Modalities] = Counter()
    for seed in range(4000):
        if scenario.keeps is None or scenario.keeps(sample(), stream(seed, "test")):
            drawn[scenario.visible(sample(), 0, stream(seed, "test"))] += 1
    assert scenario.expected is not None
    expected = scenario.expected(BOTH, 10)
    for name, visible in PATTERNS.items():
        assert expected.get(visible, 0) == pytest.approx(RULES[empty][name])
        assert drawn[visible] / 4000 == pytest.approx(RULES[empty][name], abs=0.025)
    lost = {rule: 1 - shares["both"] - shares["image"] for rule, shares in RULES.items()}
    assert lost["keep"] == pytest.approx(0.4)
    assert lost["redraw"] == pytest.approx(0.4 / 1.4)


def test_the_published_rule_is_the_default() -> None:
    assert all(
        visible("missing", seed=seed, rate=0.5) == visible("missing", seed=seed, rate=0.5, empty="keep") for seed in range(50)
    )


@quick
@given(kind=st.sampled_from(["both", "image", "text"]), rate=st.floats(0, 0.99), seed=st.integers(0, 1000))
def test_a_redrawn_sample_is_never_empty(kind: str, rate: float, seed: int) -> None:
    shown = visible("missing", kind, seed, rate=rate, empty="redraw")
    assert shown if kind == "both" else shown == sample("s", kind).modalities


@pytest.mark.parametrize(("empty", "kind", "share"), [("keep", "text", 0.5), ("keep", "image", 0.5), ("drop", "text", 0.0)])
def test_a_sample_with_one_modality_can_lose_it(empty: str, kind: str, share: float) -> None:
    scenario = scenarios.build("missing", {"rate": 0.5, "empty": empty})
    kept = scenario.keeps or (lambda sample, rng: True)
    held = [seed for seed in range(400) if kept(sample("s", kind), stream(seed, "test"))]
    emptied = sum(not visible("missing", kind, seed, rate=0.5, empty=empty) for seed in held)
    assert emptied / 400 == pytest.approx(share, abs=0.1 * (share > 0))
    assert len(held) / 400 == pytest.approx(1.0 if empty == "keep" else 0.5, abs=0.1)


def test_a_question_without_modalities_is_not_dropped() -> None:
    scenario = scenarios.build("missing", {"rate": 0.9, "empty": "drop"})
    assert scenario.keeps is not None
    assert all(scenario.keeps(sample("s", "none"), stream(seed, "test")) for seed in range(20))


def test_missing_draws_the_image_independently_of_the_text() -> None:
    for seed in range(50):
        paired = visible("missing", "both", seed, rate=0.5)
        alone = visible("missing", "image", seed, rate=0.5)
        assert alone == paired & {"image"}


@pytest.mark.parametrize(("never_empty", "empty"), [(True, "redraw"), (False, "keep")])
def test_the_former_option_is_understood(never_empty: bool, empty: str) -> None:
    assert scenarios.check("missing", {"rate": 0.4, "never_empty": never_empty}) == {"rate": 0.4, "empty": empty}


@pytest.mark.parametrize(
    "options", [{"never_empty": 1}, {"never_empty": "true"}, {"never_empty": True, "empty": "redraw"}, {"never_empty": None}]
)
def test_an_unclear_former_option_is_refused_with_what_to_write(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        scenarios.build("missing", options)
    assert str(caught.value) == (
        'scenario.never_empty: this option is now `empty`; write empty = "redraw" for true or "keep" for false.'
    )


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


@pytest.mark.parametrize(("coin", "one", "none"), [("client", 0.24 + 0.08, 0.0), ("sample", 0.24, 0.16)])
def test_hybrid_mixes_clients_by_presence(coin: str, one: float, none: float) -> None:
    counts = Counter(clients_of("hybrid", 4000, presence=0.6, coin=coin))
    # 0.6² have both; 0.4² would have none: a coin gives half of them to each, or they toss it for every sample.
    for has, share in ((BOTH, 0.36), (IMAGE, one), (TEXT, one), (NONE, none)):
        assert counts[has] / 4000 == pytest.approx(share, abs=0.03 * (share > 0))


def test_hybrid_at_the_limits_of_presence() -> None:
    assert clients_of("hybrid", 20, presence=1.0) == [BOTH] * 20
    assert Counter(map(len, clients_of("hybrid", 20, presence=0.0, coin="client"))) == {1: 20}
    assert clients_of("hybrid", 20, presence=0.0) == [NONE] * 20


@pytest.mark.parametrize("coin", ["sample", "client"])
def test_hybrid_clients_do_not_depend_on_how_many_follow(coin: str) -> None:
    assert clients_of("hybrid", 30, coin=coin)[:10] == clients_of("hybrid", 10, coin=coin)


def test_both_coins_leave_the_clients_with_modalities_alike() -> None:
    pairs = zip(clients_of("hybrid", 200, presence=0.5), clients_of("hybrid", 200, presence=0.5, coin="client"), strict=True)
    assert all(by_sample in (by_client, NONE) for by_sample, by_client in pairs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("missing", {"rate": 1.0}),
        ("missing", {"rate": -0.1}),
        ("missing", {"rate": float("nan")}),
        ("missing", {"empty": "delete"}),
        ("missing", {"empty": True}),
        ("cross", {"image_clients": -1}),
        ("cross", {"image_clients": 1.5}),
        ("cross", {"image_clients": float("nan")}),
        ("cross", {"image_clients": True}),
        ("hybrid", {"presence": 1.1}),
        ("hybrid", {"presence": -0.1}),
        ("hybrid", {"coin": "batch"}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"^scenario"):
        scenarios.build(name, options)
