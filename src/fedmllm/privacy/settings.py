"""The table `[privacy]` of the experiment file. Imports no accountant, whose library is optional."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedmllm.algorithms.base import positive
from fedmllm.registry import Registry


@dataclass(frozen=True)
class UserLevel:
    """The options of `user-level`; its factory says what they mean."""

    delta: float
    epsilon: float | None
    noise: float | None
    clip: float
    clipping: Literal["fixed", "adaptive"]
    quantile: float
    clip_lr: float
    count_noise: float | None


LARGEST_EPSILON = 500.0
SMALLEST_DELTA = 1e-15
"""Below it, the mass that the accountant cuts off would count."""
privacies: Registry[UserLevel | None] = Registry("privacy", __name__)


@privacies.register("none")
def no_privacy() -> None:
    """No noise is added, and nothing is promised about what the model reveals."""


@privacies.register("user-level")
def user_level(
    *,
    delta: float,
    epsilon: float | None = None,
    noise: float | None = None,
    clip: float = 0.1,
    clipping: Literal["fixed", "adaptive"] = "adaptive",
    quantile: float = 0.5,
    clip_lr: float = 0.2,
    count_noise: float | None = None,
) -> UserLevel:
    """The model reveals little about any one client: clipped changes, Gaussian noise on their sum (DP-FedAvg, 1710.06963).

    The run is (`epsilon`, `delta`)-differentially private for the addition or removal of one client. The noise, in multiples
    of the clip, is planned for `epsilon` or given as `noise`; if both are given, the run ends with the last round that fits.
    The change that a client sends is shortened to `clip`, or to a bound that starts there and follows the `quantile` of the
    changes' lengths at the rate `clip_lr` (1905.03871), for which the number of clients within the bound is counted with
    noise of the standard deviation `count_noise`.
    """
    if epsilon is None and noise is None:
        raise ValueError("epsilon or noise is required: set epsilon, for which the noise is planned, or the noise itself")
    given = {"epsilon": epsilon, "count_noise": count_noise}
    positive(clip=clip, clip_lr=clip_lr, **{name: value for name, value in given.items() if value is not None})
    if noise is not None and noise < 0:
        raise ValueError(f"noise = {noise} must not be negative; 0 adds none and promises nothing")
    if epsilon is not None and epsilon > LARGEST_EPSILON:
        raise ValueError(f"epsilon = {epsilon} must be at most {LARGEST_EPSILON:g}, and promises nothing far below that")
    if not SMALLEST_DELTA <= delta < 1:
        raise ValueError(f"delta = {delta} must be at least {SMALLEST_DELTA:g} and below 1")
    if not 0 < quantile < 1:
        raise ValueError(f"quantile = {quantile} must be above 0 and below 1")
    return UserLevel(delta, epsilon, noise, clip, clipping, quantile, clip_lr, count_noise)
