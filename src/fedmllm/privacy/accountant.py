"""From noise to ε and back: the privacy loss distribution of Gaussian noise on sums over Poisson samples of clients.

Neighbouring federations differ by one client that is added or removed (Koskela et al. 2020, 1906.03049; Doroshenko et al.
2022, 2207.04380). All figures are upper bounds, from Google's dp-accounting, which is imported on first use.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

_TOLERANCE = 5e-4
"""Relative; planned noise may be so much larger than needed."""
_MOST_NOISE = 2.0**20


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
    return float(_one_round(noise, probability).self_compose(rounds).get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def plan_noise(epsilon: float, delta: float, probability: float, rounds: int) -> float:
    """The smallest noise, to 0.05 %, with which `rounds` rounds spend at most `epsilon`. Raises ValueError if it is absurd."""

    def fits(noise: float) -> bool:
        return epsilon_after(rounds, noise, probability, delta) <= epsilon

    low = high = 1.0
    while not fits(high):
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            raise ValueError(f"privacy.epsilon = {epsilon} needs more than {_MOST_NOISE:g} times the clip as noise; raise it")
    while low == high or fits(low):
        low, high = low / 2, low
    while high / low > 1 + _TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def rounds_within(epsilon: float, delta: float, noise: float, probability: float, rounds: int) -> int:
    """How many rounds, at most `rounds`, spend at most `epsilon`."""
    low, high = 0, rounds
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if epsilon_after(middle, noise, probability, delta) <= epsilon else (low, middle - 1)
    return low
