"""DP-FedAvg: the sum of clipped changes with Gaussian noise, in place of the mean of the updates.

McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models" (1710.06963). Each client takes part in a round
with probability q, independently of the others, so a round may have none. With N clients,

    Δ̄ = (Σ_k min(1, C / ‖Δ_k‖) Δ_k + N(0, (z_Δ C)² I)) / (q N)

where Δ_k is the change of everything that client k sends. The divisor is the expected number of clients, because the true one
would reveal who takes part, and all clients weigh alike. With a fixed clip, z_Δ is the noise z of the accountant. An adaptive
one follows the quantile γ of the lengths (Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping",
1905.03871), and z is shared between the changes and the count of clients within the clip:

    b̃ = ½ + (Σ_k (b_k − ½) + N(0, σ_b²)) / (q N),   b_k = 1 if ‖Δ_k‖ ≤ C else 0
    C ← C exp(−η (b̃ − γ)),   z_Δ = (z⁻² − (2 σ_b)⁻²)^(−½)

A client whose update is missing or was refused adds nothing to either sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedmllm.algorithms import Algorithm, RoundInfo, Update
from fedmllm.algorithms.combining import Combined
from fedmllm.privacy.accountant import epsilon_after, plan_noise, rounds_within
from fedmllm.privacy.settings import UserLevel
from fedmllm.rng import stream
from fedmllm.tensors import State, add, digest, norm, scale, subtract

GROUP = "privacy"
"""The group of the server's state that holds the adaptive clip."""


@dataclass(frozen=True)
class Mechanism:
    """What a run does for privacy: `rounds` rounds for which `expected` of all clients are drawn, each with `probability`, and
    noise of the multiple `noise` of the clip."""

    settings: UserLevel
    probability: float
    expected: int
    rounds: int
    noise: float

    @classmethod
    def plan(cls, settings: UserLevel, clients: int, expected: int, rounds: int) -> Mechanism:
        """The mechanism for up to `rounds` rounds. Raises ValueError if the budget does not suffice for one."""
        probability, epsilon, delta = expected / clients, settings.epsilon, settings.delta
        noise = settings.noise
        if noise is None:
            assert epsilon is not None, "one of the two is required"
            noise = plan_noise(epsilon, delta, probability, rounds)
        elif epsilon is not None:
            rounds = rounds_within(epsilon, delta, noise, probability, rounds)
            if not rounds:
                first = epsilon_after(1, noise, probability, delta)
                raise ValueError(
                    f"privacy.epsilon = {epsilon} is less than the first round spends with privacy.noise = {noise}, which is "
                    f"{first:.3g}; raise one of them, or leave out the noise to have it planned"
                )
        mechanism = cls(settings, probability, expected, rounds, noise)
        mechanism.update_noise  # noqa: B018 (checked now)
        return mechanism

    @property
    def count_noise(self) -> float:
        """σ_b: a twentieth of the clients, as in the paper, but no less than z, so that z_Δ is at most 1.16 z."""
        if self.settings.count_noise is not None:
            return self.settings.count_noise
        return max(self.expected / 20, self.noise)

    @property
    def update_noise(self) -> float:
        """z_Δ. Raises ValueError if σ_b alone spends more than the accountant allows for both."""
        if self.settings.clipping == "fixed" or not self.noise:
            return self.noise
        if not self.noise < 2 * self.count_noise:
            raise ValueError(
                f"privacy.count_noise = {self.count_noise} must be more than half of the noise, which is {self.noise:.4g}; "
                "raise it, or leave it out"
            )
        return 1 / math.sqrt(self.noise**-2 - (2 * self.count_noise) ** -2)

    def summary(self) -> str:
        """What is planned, in one line."""
        noise, delta = f"noise of {self.noise:.4g} times the clip", self.settings.delta
        spent = f"epsilon = {self.epsilon(self.rounds):.3g} at delta = {delta:g}" if self.noise else "no epsilon"
        return f"{spent} after {self.rounds} rounds of {self.expected} expected clients, with {noise}"

    def epsilon(self, rounds: int) -> float:
        """ε after so many rounds; infinite without noise."""
        return epsilon_after(rounds, self.noise, self.probability, self.settings.delta)

    def to_json(self, rounds: int) -> dict[str, Any]:
        """The figures of a run that ends after so many rounds; ε is NaN without noise."""
        return {
            "epsilon": self.epsilon(rounds) if self.noise else math.nan,
            "delta": self.settings.delta,
            "noise": self.noise,
            "clip": self.settings.clip,
            "clipping": self.settings.clipping,
            "sampling": "poisson",
            "probability": self.probability,
            "unit": "client",
            "neighbours": "add or remove one",
        }


@dataclass(frozen=True)
class NoisyMean:
    """The combiner. Its noise follows from `seed`, the round and the sum, so a round that is repeated has the same noise if
    all clients answer as before, and other noise if they do not: equal noise on two sums would reveal their difference."""

    mechanism: Mechanism
    seed: int

    def __call__(self, updates: Sequence[Update], algorithm: Algorithm, state: State, info: RoundInfo) -> Combined:
        mechanism, settings = self.mechanism, self.mechanism.settings
        clip = float(state[GROUP]["clip"]) if GROUP in state else settings.clip
        sent = algorithm.message(state, 0, info)["adapter"]
        start = {name: sent[name].double() for name in algorithm.uploads(state, 0, info)["adapter"]}
        total, within = {name: torch.zeros_like(tensor) for name, tensor in start.items()}, 0
        for update in updates:
            change = subtract({name: tensor.double() for name, tensor in update.groups["adapter"].items()}, start)
            length = norm(change)
            within += length <= clip
            total = add(total, scale(change, min(1.0, clip / length) if length else 1.0))
        rng = stream(self.seed, "privacy noise", info.round, digest(total))
        deviation = mechanism.update_noise * clip
        noisy = {name: total[name] + torch.from_numpy(rng.normal(0, deviation, total[name].shape)) for name in sorted(total)}
        mean = {name: (start[name] + noisy[name] / mechanism.expected).to(sent[name].dtype) for name in start}
        figures = {"clip": clip}
        if mechanism.noise:
            figures["epsilon"] = mechanism.epsilon(info.round + 1)
        kept: State = {}
        if settings.clipping == "adaptive":
            count = within - len(updates) / 2 + rng.normal(0, mechanism.count_noise if mechanism.noise else 0.0)
            share = 0.5 + count / mechanism.expected
            figures["within"] = share
            new_clip = clip * math.exp(-settings.clip_lr * (share - settings.quantile))
            kept = {GROUP: {"clip": torch.tensor(new_clip, dtype=torch.float64)}}
        return Combined([Update(0, {"adapter": mean}, 1, 1)], privacy=figures, state=kept)
