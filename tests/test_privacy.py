"""User-level differential privacy: the accountant, the noise, the clip, and rounds of any number of clients."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chi2

from fedmllm.algorithms import RoundInfo, Update, algorithms, failed
from fedmllm.algorithms.combining import Combined
from fedmllm.algorithms.traffic import keeps_memory
from fedmllm.federation import FederationPlan, RoundRecord, federate, participants, sample_clients
from fedmllm.privacy.accountant import epsilon_after
from fedmllm.privacy.settings import privacies
from fedmllm.privacy.user_level import Mechanism, NoisyMean
from fedmllm.storage.state_file import load_state, save_state
from fedmllm.tensors import State, Tensors, add, norm, scale, subtract, zeros_like
from helpers import ADAPTER_INFO, FakeFleet, lora_adapter, quick, round_info, same

ADAPTER = lora_adapter()
CAPABLE = [
    "fedavg", "fedprox", "fedavgm", "fedadagrad", "fedyogi", "fedadam", "ffa-lora", "fedsvd", "rolora", "fedrot-lora", "frlora",
    "yoco",
]  # fmt: skip


def mechanism(clients: int = 5, expected: int = 3, rounds: int = 4, **options: Any) -> Mechanism:
    settings = privacies.build("user-level", {"delta": 1e-3, "clipping": "fixed", **options})
    assert settings is not None
    return Mechanism.plan(settings, clients, expected, rounds)


def combined(updates: Sequence[Update], state: State | None = None, seed: int = 0, **options: Any) -> Combined:
    algorithm = algorithms.build("fedavg", {})
    before = algorithm.init(ADAPTER) if state is None else state
    return NoisyMean(mechanism(**options), seed)(updates, algorithm, before, round_info())


def change_of(result: Combined) -> Tensors:
    (update,) = result.updates
    return subtract(update.groups["adapter"], {name: ADAPTER[name] for name in update.groups["adapter"]})


def update_of(client: int, length: float, direction: int = 0, examples: int = 1) -> Update:
    """An update that changes one number of every tensor, by `length` in all."""
    step = zeros_like(ADAPTER)
    for tensor in step.values():
        tensor.view(-1)[direction] = length / math.sqrt(len(step))
    return Update(client, {"adapter": add(ADAPTER, step)}, examples, 1)


# The clip


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=5), st.floats(0.01, 5.0))
@quick
def test_the_clip_is_exact_on_what_travels(lengths: list[float], clip: float) -> None:
    """Every client adds to the sum its change, shortened to the clip; those that fit are not touched."""
    updates = [update_of(client, length, client % 6) for client, length in enumerate(lengths)]
    algorithm = algorithms.build("fedavg", {})
    for update in updates:
        sent = subtract(
            {n: t.double() for n, t in update.groups["adapter"].items()}, {n: t.double() for n, t in ADAPTER.items()}
        )
        alone = NoisyMean(mechanism(5, 1, noise=0.0, clip=clip), 0)([update], algorithm, algorithm.init(ADAPTER), round_info())
        length = norm(change_of(alone))
        assert length <= clip + 1e-6, "1e-6 is the rounding of float32"
        assert length == pytest.approx(min(norm(sent), clip), abs=1e-6)
    total = change_of(combined(updates, noise=0.0, clip=clip))
    for direction in range(6):
        expected = sum(min(length, clip) for client, length in enumerate(lengths) if client % 6 == direction) / 3
        for tensor in total.values():
            assert float(tensor.view(-1)[direction]) == pytest.approx(expected / math.sqrt(len(ADAPTER)), abs=1e-6)


@pytest.mark.parametrize(("name", "factors"), [("fedavg", "AB"), ("ffa-lora", "B"), ("fedsvd", "B"), ("rolora", "B")])
def test_only_what_is_sent_is_measured_clipped_and_noised(name: str, factors: str) -> None:
    """FedSVD sends both factors down and B up; the clip and the noise concern B."""
    algorithm = algorithms.build(name, {})
    state = algorithm.init(ADAPTER)
    names = [n for n in ADAPTER if any(f"lora_{factor}" in n for factor in factors)]
    changed = Update(0, {"adapter": {n: ADAPTER[n] + 1 for n in names}}, 1, 1)
    result = NoisyMean(mechanism(5, 1, noise=0.0, clip=0.5), 0)([changed], algorithm, state, round_info())
    assert result.updates[0].groups["adapter"].keys() == set(names)
    assert norm(change_of(result)) == pytest.approx(0.5, abs=1e-5)
    noisy = NoisyMean(mechanism(5, 1, noise=1.0), 0)([changed], algorithm, state, round_info())
    after = algorithm.aggregate(state, noisy.updates, round_info())
    assert all(tensor.abs().max() > 0 for tensor in after["adapter"].values())


def test_sample_counts_do_not_weigh_and_the_divisor_is_the_expected_number() -> None:
    few, many = (change_of(combined([update_of(0, 0.03), update_of(1, 0.06, 1, n)], noise=0.0)) for n in (1, 1000))
    assert same({"a": few}, {"a": many})
    first = next(iter(few.values())).view(-1) * math.sqrt(len(ADAPTER))
    assert first[:3].tolist() == pytest.approx([0.03 / 3, 0.06 / 3, 0.0], abs=1e-7), "two came, and three were expected"


# The noise


@pytest.mark.parametrize(
    ("clip", "noise", "expected", "options", "deviation"),
    [
        (0.1, 1.0, 3, {}, 0.1 / 3),
        (2.0, 0.7, 5, {}, 1.4 / 5),
        # z_Δ = (1 − 1 / 1.44)^(−½): the count takes its share of z.
        (0.5, 1.0, 4, {"clipping": "adaptive", "count_noise": 0.6}, 0.5 * 1.8090681 / 4),
    ],
)
def test_the_noise_has_the_stated_deviation(
    clip: float, noise: float, expected: int, options: dict[str, Any], deviation: float
) -> None:
    """Σ x² / σ² has a χ² distribution, and no draw repeats another."""
    drawn = [change_of(combined([], seed=number, clip=clip, noise=noise, expected=expected, **options)) for number in range(60)]
    total = sum(norm(change) ** 2 for change in drawn) / deviation**2
    assert 0.005 < chi2.cdf(total, 60 * sum(t.numel() for t in ADAPTER.values())) < 0.995
    assert len({round_key(change) for change in drawn}) == 60


def round_key(change: Tensors) -> tuple[float, ...]:
    return tuple(next(iter(change.values())).view(-1).tolist())


def test_the_noise_is_centred_and_differs_between_the_numbers() -> None:
    drawn = torch.cat([t.view(-1) for number in range(40) for t in change_of(combined([], seed=number, noise=1.0)).values()])
    deviation = 0.1 / 3
    assert abs(float(drawn.mean())) < 3 * deviation / math.sqrt(drawn.numel())
    assert len(set(drawn.tolist())) > 0.99 * drawn.numel()


def test_a_repeated_round_has_the_same_noise_only_if_the_sum_is_the_same() -> None:
    """Otherwise the difference of two versions of a round would show the update that only one of them has."""
    both, alone = [update_of(0, 0.05), update_of(1, 0.05, 1)], [update_of(0, 0.05)]
    first, again, without = (combined(updates, noise=1.0) for updates in (both, both, alone))
    assert same(first.updates[0].groups, again.updates[0].groups)
    later = NoisyMean(mechanism(noise=1.0), 0)(both, algorithms.build("fedavg", {}), {"adapter": ADAPTER}, round_info(1))
    assert not same(first.updates[0].groups, later.updates[0].groups)
    difference = subtract(change_of(first), change_of(without))
    assert norm(difference) > 5 * 0.05 / 3


# The adaptive clip


@given(
    st.lists(st.lists(st.floats(0.0, 2.0), max_size=6), min_size=1, max_size=5),
    st.floats(0.1, 0.9),
    st.floats(0.05, 1.0),
    st.floats(0.05, 1.0),
)
@quick
def test_the_adaptive_clip_follows_its_formula(rounds: list[list[float]], quantile: float, rate: float, start: float) -> None:
    options = {"clipping": "adaptive", "quantile": quantile, "clip_lr": rate, "clip": start, "noise": 0.0}
    algorithm, clip, state = algorithms.build("fedavg", {}), start, algorithms.build("fedavg", {}).init(ADAPTER)
    for number, lengths in enumerate(rounds):
        updates = [update_of(client, length) for client, length in enumerate(lengths)]
        result = NoisyMean(mechanism(**options), 0)(updates, algorithm, state, round_info(number))
        assert result.privacy["clip"] == pytest.approx(clip, rel=1e-9)
        # float32 decides on which side of the clip a length falls.
        inside = sum(
            norm(subtract({n: t.double() for n, t in u.groups["adapter"].items()}, {n: t.double() for n, t in ADAPTER.items()}))
            <= clip
            for u in updates
        )
        halves = [0.5 if i < inside else -0.5 for i in range(len(updates))]
        clip *= math.exp(-rate * (0.5 + sum(halves) / 3 - quantile))
        state = {**state, **result.state}
        assert float(state["privacy"]["clip"]) == pytest.approx(clip, rel=1e-9)


def test_the_clip_finds_the_median_length() -> None:
    lengths, state = [0.5, 1.0, 2.0], algorithms.build("fedavg", {}).init(ADAPTER)
    updates = [update_of(client, length) for client, length in enumerate(lengths)]
    for number in range(120):
        result = combined(updates, state, number, clipping="adaptive", noise=0.3, clip=0.05, count_noise=0.3)
        state = {**state, **result.state}
    assert 0.6 < float(state["privacy"]["clip"]) < 1.7


@pytest.mark.parametrize(
    ("noise", "options", "count_noise", "update_noise"),
    [
        (1.0, {}, 5.0, 1 / math.sqrt(1 - 0.1**2)),
        (0.5, {"count_noise": 0.5}, 0.5, 1 / math.sqrt(4 - 1)),
        (9.0, {}, 9.0, 9.0 * math.sqrt(4 / 3)),
        (1.0, {"clipping": "fixed"}, 5.0, 1.0),
        (0.0, {}, 5.0, 0.0),
    ],
)
def test_the_noise_is_split_between_changes_and_count(
    noise: float, options: dict[str, Any], count_noise: float, update_noise: float
) -> None:
    split = mechanism(1000, 100, noise=noise, **{"clipping": "adaptive", **options})
    assert split.count_noise == count_noise
    assert split.update_noise == pytest.approx(update_noise)
    if options.get("clipping") != "fixed" and noise:
        # Two Gaussian mechanisms on one vector, whose sensitivities are 1 and ½, are one of noise z.
        assert split.update_noise**-2 + (2 * split.count_noise) ** -2 == pytest.approx(noise**-2)


def test_the_count_of_clients_is_noisy() -> None:
    shares = [
        combined([], None, number, clipping="adaptive", noise=1.0, count_noise=2.0).privacy["within"] for number in range(200)
    ]
    spread = sum((share - 0.5) ** 2 for share in shares) / (2.0 / 3) ** 2
    assert 0.005 < chi2.cdf(spread, 200) < 0.995


# Rounds

PLAN = FederationPlan(tuple(range(40)), 2, 6, 0.1, "cosine", 0, seed=0, adapter=ADAPTER_INFO, max_norm_ratio=0.0, poisson=True)


def private(name: str = "fedavg", plan: FederationPlan = PLAN, **options: Any) -> tuple[FakeFleet, FederationPlan]:
    adaptive = {"clipping": "adaptive", "noise": 0.5, **options}
    planned = mechanism(len(plan.clients), plan.per_round, plan.rounds, **adaptive)
    return FakeFleet(algorithms.build(name, {})), replace(plan, combine=NoisyMean(planned, plan.seed))


def rounds_of(
    fleet: FakeFleet, plan: FederationPlan, resume: tuple[int, State] | None = None
) -> list[tuple[RoundRecord, State]]:
    return list(federate(fleet.algorithm, fleet, plan, ADAPTER, resume))


def test_clients_are_drawn_independently() -> None:
    plan = replace(PLAN, rounds=4000)
    counts = Counter(len(sample_clients(plan, number)) for number in range(4000))
    for size in range(6):
        assert counts[size] / 4000 == pytest.approx(binom.pmf(size, 40, 2 / 40), abs=0.025)
    times = Counter(client for number in range(4000) for client in sample_clients(plan, number))
    assert all(times[client] / 4000 == pytest.approx(2 / 40, abs=0.015) for client in plan.clients)
    together = sum({3, 4} <= set(sample_clients(plan, number)) for number in range(4000))
    assert together / 4000 == pytest.approx((2 / 40) ** 2, abs=0.003)
    assert sample_clients(replace(plan, per_round=40), 7) == plan.clients
    assert participants(PLAN) == sorted({c for number in range(6) for c in sample_clients(PLAN, number)})


@pytest.mark.parametrize("name", CAPABLE)
def test_rounds_without_clients_are_rounds(name: str) -> None:
    fleet, plan = private(name, replace(PLAN, per_round=1))
    results = rounds_of(fleet, plan)
    empty = [record for record, _ in results if not record.sampled]
    assert 0 < len(empty) < 6
    for record in empty:
        assert (record.examples, record.steps, record.bytes_up, record.bytes_down) == (0, 0, {}, {})
        assert math.isnan(record.loss)
    assert [record.privacy["epsilon"] for record, _ in results] == [
        epsilon_after(number, 0.5, 1 / 40, 1e-3) for number in range(1, 7)
    ]
    # FRLoRA starts every round from the same adapter, and what it learns is in the fold.
    states = [{"adapter": ADAPTER}, *({g: state[g] for g in ("adapter", "fold") if g in state} for _, state in results)]
    assert all(not same(a, b) for a, b in pairwise(states)), "noise"


def test_what_does_not_arrive_adds_nothing() -> None:
    def spoil(number: int, updates: list[Update]) -> list[Update]:
        ways: list[Callable[[Update], Update | None]] = [
            lambda u: failed(u.client, "gone"),
            lambda u: replace(u, examples=0),
            lambda u: None,
            lambda u: replace(u, groups={"adapter": scale(u.groups["adapter"], math.nan)}),
        ]
        altered = [ways[u.client % 4](u) for u in updates]
        return [u for u in altered if u is not None]

    (all_bad, plan), (silent, _) = private(), private()
    all_bad.alter, silent.alter = spoil, lambda number, updates: []
    bad, none = rounds_of(all_bad, plan), rounds_of(silent, plan)
    assert sum(len(record.refused) for record, _ in bad) > 3
    assert all(same(a[1], b[1]) and a[0].privacy == b[0].privacy for a, b in zip(bad, none, strict=True))


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    whole = rounds_of(*private("fedadam"))
    for done in (1, 4):
        save_state(tmp_path / "state", whole[done - 1][1])
        continued = rounds_of(*private("fedadam"), (done, load_state(tmp_path / "state")[0]))
        for (record, state), (expected_record, expected) in zip(continued, whole[done:], strict=True):
            assert same(state, expected)
            assert record.privacy == expected_record.privacy


def test_the_clip_is_never_sent() -> None:
    fleet, plan = private()
    results = rounds_of(fleet, plan)
    assert "privacy" in results[-1][1]
    sent: list[Mapping[str, Tensors]] = [message for _, messages in fleet.seen for message in messages.values()]
    assert sent
    assert all(message.keys() == {"adapter"} for message in sent)


def test_no_length_is_compared_with_the_others() -> None:
    """One client more must not decide whether another counts."""
    fleet, plan = private(plan=replace(PLAN, per_round=10))
    fleet.alter = lambda number, updates: [
        replace(u, groups={"adapter": add(ADAPTER, {n: t + 1e6 for n, t in u.groups["adapter"].items()})}) if i == 0 else u
        for i, u in enumerate(updates)
    ]
    assert not any(record.refused for record, _ in rounds_of(fleet, plan))


def test_which_algorithms_let_clients_remember() -> None:
    remembering = {name for name in algorithms.names() if keeps_memory(algorithms.build(name, {}))}
    assert remembering == {"scaffold", "feddyn", "fedsa-lora", "ditto", "feddpa"}


def test_the_info_of_a_round_may_name_nobody() -> None:
    info: RoundInfo = PLAN.info(0, ())
    assert info.sampled == ()
