"""From noise to ε and back: the privacy loss distribution of Gaussian noise on sums over Poisson samples of clients.

Neighbouring federations differ by one client that is added or removed (Koskela et al. 2020, 1906.03049; Doroshenko et al.
2022, 2207.04380). All figures are upper bounds, from Google's dp-accounting, which is imported on first use.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

_MOST_NOISE = 2.0**10


@lru_cache(maxsize=64)
def _one_round(noise: float, probability: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    # A grid in proportion to the losses themselves: within 0.1 % of one that is ten times as fine, and ten times as fast.
    interval = 1e-3 / min(noise, noise**2)
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, value_discretization_interval=interval, sampling_prob=probability
    )


@lru_cache(maxsize=4096)
def epsilon_after(rounds: int, noise: float, probability: float, delta: float) -> float:
    """ε of `rounds` rounds in which each client takes part with `probability` and noise of `noise` times the largest
    contribution is added to the sum; infinite without noise."""
    if rounds == 0:
        return 0.0
    if noise == 0:
        return math.inf
    with np.errstate(all="ignore"):  # of an ε in the hundreds, e^ε overflows
        return float(_one_round(noise, probability).self_compose(rounds).get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def plan_noise(epsilon: float, delta: float, probability: float, rounds: int) -> float:
    """The noise with which `rounds` rounds spend `epsilon`, or up to 0.2 % less. Raises ValueError if it is absurd."""

    from scipy.optimize import brentq  # thirty megabytes that only runs with [privacy] need

    def excess(log_noise: float) -> float:
        spent = epsilon_after(rounds, math.exp(log_noise), probability, delta)
        return math.log(min(spent, 1e300) / (0.999 * epsilon))

    # A grid of factors 2, so that other budgets meet the same distributions in the cache.
    high = 0.0
    while excess(high) > 0:
        high += math.log(2)
        if high > math.log(_MOST_NOISE):
            raise ValueError(f"privacy.epsilon = {epsilon} needs more than {_MOST_NOISE:g} times the clip as noise; raise it")
    low = high - math.log(2)
    while excess(low) <= 0:
        low, high = low - math.log(2), low
    return math.exp(brentq(excess, low, high, xtol=1e-4))


def rounds_within(epsilon: float, delta: float, noise: float, probability: float, rounds: int) -> int:
    """How many rounds, at most `rounds`, spend at most `epsilon`."""
    low, high = 0, rounds
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if epsilon_after(middle, noise, probability, delta) <= epsilon else (low, middle - 1)
    return low
