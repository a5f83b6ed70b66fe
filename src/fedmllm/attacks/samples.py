"""Attacks on training data: attackers train as everybody does, on samples that they have falsified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from fedmllm.attacks.settings import Attack, Draw, Shown, attacks
from fedmllm.data.samples import Modality
from fedmllm.data.scenarios import BOTH

T = TypeVar("T")


def _another(own: T, options: Sequence[T], rng: np.random.Generator) -> T:
    """One of the options that differ from `own`, each equally likely; `own` if there is none."""
    others = [option for option in options if option != own]
    return others[int(rng.integers(len(others)))] if others else own


@attacks.register("label-flip")
def label_flip(*, share: float = 0.2, start: int = 0) -> Attack:
    """Attackers train on wrong answers: another of the choices, or another answer from their own open questions.

    The same wrong answer in every round. An open question keeps its answer if the attacker has no other.
    """

    def falsify(shown: Sequence[Shown], draw: Draw) -> list[Shown]:
        answers = sorted({sample.answer for sample, _ in shown if not sample.choices})
        return [
            (replace(sample, answer=_another(sample.answer, sample.choices or answers, draw(sample))), visible)
            for sample, visible in shown
        ]

    return Attack(share, start, falsify=falsify)


@attacks.register("modality-swap")
def modality_swap(*, share: float = 0.2, start: int = 0) -> Attack:
    """Attackers train on wrong pictures: each sample that shows one gets that of another of their samples.

    The same wrong picture in every round. An attacker that sees no two different pictures trains honestly.
    """

    def falsify(shown: Sequence[Shown], draw: Draw) -> list[Shown]:
        by_id = sorted((sample for sample, visible in shown if "image" in visible), key=lambda sample: sample.id)
        pictures = list(dict.fromkeys(sample.image for sample in by_id))
        return [
            (replace(sample, image=_another(sample.image, pictures, draw(sample))) if "image" in visible else sample, visible)
            for sample, visible in shown
        ]

    return Attack(share, start, falsify=falsify)


@attacks.register("modality-drop")
def modality_drop(*, share: float = 0.2, start: int = 0, modality: Modality = "image") -> Attack:
    """Attackers claim both modalities and train without one: `modality` is hidden wherever they have both.

    The manifest and everything computed from it still say that they have both. An attacker without such samples trains
    honestly.
    """

    def falsify(shown: Sequence[Shown], draw: Draw) -> list[Shown]:
        return [(sample, visible - {modality} if visible == BOTH else visible) for sample, visible in shown]

    return Attack(share, start, falsify=falsify)
