"""Membership: did a client train on this sample? Three attacks on single updates and on sums, with and without noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmllm.config import TrainTable
from fedmllm.models.encoded import Encoded
from fedmllm.rng import stream
from leaks.statistics import auc_and_tpr
from leaks.victim import Floats, Victim, noisy_sum, train_table

OUTSIDERS = 99
"""Samples of nobody in each repetition: the best of 99 is exceeded by one sample of nobody in a hundred."""
ATTACKS = ("loss", "match", "joint")


@dataclass(frozen=True)
class Setting:
    """How clients train and what is seen of it: `clients` updates are summed, with noise of `noise` times the clipping norm.

    `first` means the first round, whose adapter has B = 0; otherwise the adapter has been trained for a few rounds.
    """

    samples: int
    clients: int = 1
    noise: float = 0.0
    epochs: int = 1
    optimizer: str = "adamw"
    first: bool = False

    @property
    def train(self) -> TrainTable:
        return train_table(self.optimizer, self.epochs)


class Candidates:
    """Samples that an attacker asks about: has a client trained on them? It knows the received adapter and their content.

    A score is higher the more a sample looks like a member:

    - loss: how much lower its loss is under the received adapter plus the mean update than under the received one.
    - match: the cosine of the update and the descent direction −g of the sample's own loss.
    - joint: its coefficient if the update is explained by the directions −g of all candidates at once (ridge regression),
      so that a candidate is not credited with what another explains better.
    """

    def __init__(self, victim: Victim, adapter: Tensor, samples: Sequence[Encoded]) -> None:
        self.victim, self.adapter, self.samples = victim, adapter, samples
        self.directions = -torch.nn.functional.normalize(victim.gradients(adapter, samples), dim=1)
        self.before = victim.losses(adapter, samples)

    def scores(self, total: Tensor, clients: int, chosen: NDArray[np.int64], with_loss: bool) -> dict[str, Floats]:
        """attack -> (chosen): scores of the candidates with these numbers, from the sum of the updates of `clients`."""
        directions = self.directions[chosen]
        match = (directions @ (total / total.norm())).double().numpy()
        gram = (directions @ directions.T).double().numpy() + RIDGE * np.eye(len(chosen))
        scores = {"match": match, "joint": np.linalg.solve(gram, match)}
        if with_loss:
            after = self.victim.losses(self.adapter + total / clients, [self.samples[i] for i in chosen])
            scores["loss"] = self.before[chosen] - after
        return scores


RIDGE = 0.1
"""Added to the diagonal of the matrix of cosines between candidates."""


ALONE = (
    *(Setting(samples) for samples in (1, 4, 16, 64)),
    Setting(16, epochs=5),
    Setting(16, optimizer="sgd"),
    Setting(16, first=True),
)
"""Updates in the clear."""
SUMS = tuple(Setting(4, clients, noise) for clients in (1, 3, 10, 30) for noise in (0.0, 0.3, 1.0, 3.0))
"""Sums of updates. Without noise they are exact, as masked sums are; one client alone with noise is local privacy."""
MEMBERS, LOSSES = 120, 8
"""Members in a repetition, and after how many of them the attack by losses stops, because it takes most of the time."""
Figures = dict[tuple[Setting, str], tuple[float, float]]


def attack(candidates: Candidates, settings: Sequence[Setting], rng: np.random.Generator) -> Figures:
    """(setting, attack) -> (AUC, TPR) of one repetition, the mean over its updates; settings differ in clients and noise only.

    The candidates' last `OUTSIDERS` are of nobody. The first ones are dealt to clients, and those to sums.
    """
    victim, samples, setting = candidates.victim, candidates.samples, settings[0]
    members = len(samples) - OUTSIDERS
    clients = [samples[i : i + setting.samples] for i in range(0, members - setting.samples + 1, setting.samples)]
    updates = victim.updates(candidates.adapter, clients, setting.train)
    clip = float(updates.norm(dim=1).median())
    figures: Figures = {}
    for setting in settings:
        size = setting.clients
        of_update: dict[str, list[tuple[float, float]]] = {}
        for number in range(len(clients) // size):
            seen = updates[number * size : (number + 1) * size]
            total = noisy_sum(seen, clip, setting.noise, rng) if setting.noise else seen.sum(0)
            inside = np.arange(number * size * setting.samples, (number + 1) * size * setting.samples)
            chosen = np.concatenate([inside, np.arange(members, len(samples))])
            for name, scores in candidates.scores(total, size, chosen, inside[0] < LOSSES).items():
                of_update.setdefault(name, []).append(auc_and_tpr(scores[: len(inside)], scores[len(inside) :]))
        for name, values in of_update.items():
            auc, tpr = np.mean(values, axis=0)
            figures[setting, name] = float(auc), float(tpr)
    return figures


def repetition(victim: Victim, warm: Tensor, pool: Sequence[Encoded], number: int) -> Figures:
    """The figures of all settings, with clients and outsiders drawn from `pool`."""
    rng = stream(0, "leakage", "repetition", number)
    drawn = [pool[int(i)] for i in rng.choice(len(pool), MEMBERS + OUTSIDERS, replace=False)]
    of_adapter = {first: Candidates(victim, victim.initial if first else warm, drawn) for first in (False, True)}
    figures: Figures = {}
    for settings in (*((setting,) for setting in ALONE), SUMS):
        figures |= attack(of_adapter[settings[0].first], settings, rng)
    return figures
