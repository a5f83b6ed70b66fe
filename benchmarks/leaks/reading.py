"""Inversion by reading and by imitation: which tokens did a sample's question have, which answer, and which picture?

Three attacks, which know the adapter that clients received and need no optimisation:

- span: the gradient of a factor A is s Σ_t (Bᵀ δ_t) x_tᵀ, so its rows lie in the span of the layer's inputs x_t. In the first
  layer these are the normed embeddings of the sample's tokens. A token whose input lies almost in the span of the rows of the
  changes of A in q, k and v was probably in the sample. (DAGER does this with full gradients: Petrov et al. 2024, 2405.15586.)
- copy: the attacker imitates a client with each of `PUBLIC` samples of its own and takes the one with the most similar update
  (cosine) for the client's.
- picture: it predicts the picture's features by a kernel ridge regression from those updates to its samples' features, with
  the cosine as kernel. The figure is the correlation of prediction and truth, as deviations from the mean picture.

Tokens that all prompts share are not counted. A share that says something is above that of the control: the same guess,
judged by a sample that was in no update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from fedmllm.config import TrainTable
from fedmllm.models.encoded import Encoded
from fedmllm.rng import stream
from leaks.membership import RIDGE, Setting
from leaks.victim import Victim, noisy_sum

SEEN = (
    Setting(1, optimizer="sgd"),
    Setting(1),
    Setting(1, first=True),
    Setting(4),
    Setting(16),
    *(Setting(1, clients, noise) for noise in (0.0, 0.3, 1.0) for clients in (1, 3, 10) if noise or clients > 1),
)
"""What the attacker sees. Up to 4 samples are one step of the optimizer, 16 are four."""
PUBLIC, TARGETS = 600, 30
FIGURES = (
    "span",
    "span, control",
    "copy",
    "copy, control",
    "answer",
    "answer, control",
    "question",
    "picture",
    "picture, control",
)
_LEAST = 1e-4
"""Singular values below this share of the largest are taken for rounding."""


class Imitation:
    """The updates of the attacker's own samples with these numbers, each alone at a client, under one adapter and optimizer."""

    def __init__(self, victim: Victim, adapter: Tensor, numbers: Sequence[int], train: TrainTable) -> None:
        self.samples = [victim.samples[i] for i in numbers]
        self.updates = normalize(victim.updates(adapter, [[sample] for sample in self.samples], train), dim=1)
        features = victim.features(numbers)
        self.mean = features.mean(0)
        kernel = self.updates @ self.updates.T + RIDGE * torch.eye(len(numbers))
        self._regression = torch.linalg.solve(kernel, features - self.mean)

    def copy(self, update: Tensor) -> Encoded:
        """The sample with the most similar update."""
        return self.samples[int((self.updates @ update).argmax())]

    def picture(self, update: Tensor) -> Tensor:
        """The predicted deviation of the picture's features from their mean."""
        return self.updates @ normalize(update, dim=0) @ self._regression


class Reader:
    """Guesses tokens from updates."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        decoder = victim.model.backbone.model.get_decoder()
        with torch.no_grad():
            self.inputs: Tensor = decoder.layers[0].input_layernorm(decoder.embed_tokens.weight).double()
        self.shared = frozenset.intersection(*(frozenset(sample.prompt) for sample in victim.samples))
        """Tokens that every prompt has."""
        # A picture's features take the place of the image token, so its embedding is no input.
        image = {victim.model.backbone.model.config.image_token_id}
        known = torch.linalg.qr(self.inputs[sorted(self.shared - image)].T).Q
        self.known = known @ known.T
        first = [name for name in victim.model.adapter.parameters if ".layers.0." in name and "lora_A" in name]
        self.factors = [name for name in first if "o_proj" not in name]

    def secret(self, sample: Encoded) -> frozenset[int]:
        """The tokens of question and answer that not every prompt has."""
        return frozenset((*sample.prompt, *sample.answer)) - self.shared

    def closeness(self, update: Tensor) -> Tensor:
        """(vocabulary): the share of each token's input, beyond what shared tokens explain, in the span of the changes
        of A; 1 if all of it does. NaN if A has not changed, as in the first round, when B = 0."""
        changes = self.victim.tensors(update)
        rows = normalize(torch.cat([changes[name] for name in self.factors]).double(), dim=1)
        if not rows.any():
            return torch.full((len(self.inputs),), torch.nan, dtype=torch.float64)
        _, singular, basis = torch.linalg.svd(rows - rows @ self.known, full_matrices=False)
        basis = basis[singular > _LEAST * singular[0]]
        new = self.inputs - self.inputs @ self.known
        return (new @ basis.T).norm(dim=1) / new.norm(dim=1).clamp(min=1e-9)

    def by_span(self, update: Tensor, count: int) -> frozenset[int]:
        """The `count` tokens that lie closest to the span; none if there is no span."""
        closeness = self.closeness(update)
        closeness[sorted(self.shared)] = -1.0
        return frozenset(closeness.topk(count).indices.tolist()) if not closeness.isnan().any() else frozenset()


def recovered(guess: frozenset[int], secret: frozenset[int]) -> float:
    return len(guess & secret) / len(secret)


def read(victim: Victim, warm: Tensor) -> dict[Setting, dict[str, list[float]]]:
    """setting -> figure -> its value for each target, the first sample of the first client."""
    reader, rng = Reader(victim), stream(0, "leakage", "words")
    numbers = (rng.permutation(len(victim.samples) - 512) + 512).tolist()
    public, private = numbers[:PUBLIC], numbers[PUBLIC:]
    results: dict[Setting, dict[str, list[float]]] = {}
    imitations: dict[tuple[str, bool], Imitation] = {}
    for setting in SEEN:
        adapter, key = victim.initial if setting.first else warm, (setting.optimizer, setting.first)
        if key not in imitations:
            imitations[key] = Imitation(victim, adapter, public, setting.train)
        figures = results[setting] = {name: [] for name in FIGURES}
        size = setting.samples * setting.clients
        for start in range(0, TARGETS * (size + 1), size + 1):
            *inside, outsider = private[start : start + size + 1]
            update = _seen(victim, adapter, [victim.samples[i] for i in inside], setting, rng)
            values = _judge(reader, imitations[key], update, inside[0], outsider)
            for name, value in zip(FIGURES, values, strict=True):
                figures[name].append(value)
    return results


def _seen(victim: Victim, adapter: Tensor, samples: Sequence[Encoded], setting: Setting, rng: np.random.Generator) -> Tensor:
    clients = [samples[i :: setting.clients] for i in range(setting.clients)]
    updates = victim.updates(adapter, clients, setting.train)
    clip = float(updates.norm(dim=1).median())
    return noisy_sum(updates, clip, setting.noise, rng) if setting.noise else updates.sum(0)


def _judge(reader: Reader, imitation: Imitation, update: Tensor, target: int, outsider: int) -> tuple[float, ...]:
    samples = reader.victim.samples
    inside, outside, copied = samples[target], samples[outsider], imitation.copy(update)
    secret, other, of_copied = (reader.secret(sample) for sample in (inside, outside, copied))
    span, picture = reader.by_span(update, len(secret)), imitation.picture(update)
    pictures = reader.victim.features([target, outsider]) - imitation.mean
    return (
        recovered(span, secret),
        recovered(span, other),
        recovered(of_copied, secret),
        recovered(of_copied, other),
        float(copied.answer == inside.answer),
        float(copied.answer == outside.answer),
        float(copied.prompt == inside.prompt),
        *cosine_similarity(picture.unsqueeze(0), pictures).tolist(),
    )
