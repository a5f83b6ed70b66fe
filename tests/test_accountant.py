"""From noise to ε and back: against the library, a closed form, and the figures that were asked for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from fedmllm.privacy.accountant import epsilon_after, plan_noise, rounds_within
from fedmllm.privacy.settings import privacies
from fedmllm.privacy.user_level import Mechanism


@pytest.mark.parametrize(
    ("clients", "expected", "rounds", "noise", "delta", "epsilon"),
    [
        (1000, 10, 100, 1.0, 1e-4, 0.52),
        (100, 10, 50, 1.0, 1e-3, 3.31),
        (1000, 50, 100, 0.8, 1e-4, 4.71),
        (50, 50, 3, 4.0, 1e-2, 0.76),
    ],
)
def test_epsilon_is_that_of_the_library(
    clients: int, expected: int, rounds: int, noise: float, delta: float, epsilon: float
) -> None:
    """The figures of dp-accounting's PLDAccountant on its own grid, ten times as fine."""
    assert round(epsilon_after(rounds, noise, expected / clients, delta), 2) == epsilon


def test_epsilon_is_composed_as_the_library_composes_it() -> None:
    reference = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3)
    reference.compose(PoissonSampledDpEvent(0.02, GaussianDpEvent(1.5)), 40)
    assert epsilon_after(40, 1.5, 0.02, 1e-4) == pytest.approx(reference.get_epsilon(1e-4), rel=2e-3)


def test_epsilon_without_amplification_is_that_of_the_gaussian_mechanism() -> None:
    """Rounds of noise z are one of z / √T, whose δ has a closed form (Balle and Wang 2018, 1805.06530, Theorem 8)."""
    z, rounds, delta = 5.0, 9, 1e-3
    sigma, epsilon = z / math.sqrt(rounds), epsilon_after(rounds, z, 1.0, delta)

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    expected = normal(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * normal(-0.5 / sigma - epsilon * sigma)
    assert expected == pytest.approx(delta, rel=0.01)


def test_no_rounds_spend_nothing_and_no_noise_everything() -> None:
    assert epsilon_after(0, 1.0, 0.1, 1e-3) == 0
    assert epsilon_after(1, 0.0, 0.1, 1e-3) == math.inf
    spent = [epsilon_after(rounds, 1.0, 0.1, 1e-3) for rounds in (1, 2, 10, 50)]
    assert spent == sorted(set(spent))


@pytest.mark.parametrize(
    ("epsilon", "delta", "probability", "rounds"),
    [(8, 1e-4, 0.01, 100), (1, 1e-4, 0.05, 100), (0.1, 1e-5, 0.01, 50), (100, 1e-3, 0.3, 20), (2, 1e-3, 1.0, 1)],
)
def test_planned_noise_spends_the_budget_and_no_more(epsilon: float, delta: float, probability: float, rounds: int) -> None:
    noise = plan_noise(epsilon, delta, probability, rounds)
    assert 0.99 * epsilon < epsilon_after(rounds, noise, probability, delta) <= epsilon


def test_noise_that_nobody_wants_is_not_planned() -> None:
    with pytest.raises(ValueError, match=r"privacy\.epsilon = 1e-06 needs more than 1024 times the clip as noise"):
        plan_noise(1e-6, 1e-9, 1.0, 1)


def test_rounds_end_with_the_last_that_fits() -> None:
    fit = rounds_within(2.0, 1e-3, 1.0, 0.1, 50)
    assert 0 < fit < 50
    assert epsilon_after(fit, 1.0, 0.1, 1e-3) <= 2.0 < epsilon_after(fit + 1, 1.0, 0.1, 1e-3)
    assert rounds_within(100.0, 1e-3, 1.0, 0.1, 50) == 50
    settings = privacies.build("user-level", {"delta": 1e-3, "noise": 1.0, "epsilon": 2.0})
    assert settings is not None
    assert Mechanism.plan(settings, 100, 10, 50).rounds == fit
    with pytest.raises(ValueError, match=r"privacy\.epsilon = 0\.01 is less than the first round spends .* is 0\.65"):
        Mechanism.plan(replace(settings, epsilon=0.01), 100, 10, 50)
