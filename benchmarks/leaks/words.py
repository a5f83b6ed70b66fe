"""Inversion of words: which tokens did a sample's question have, and what was its answer?

Two attacks, which know the adapter that clients received and need no optimisation:

- span: the gradient of a factor A is s Σ_t (Bᵀ δ_t) x_tᵀ, so its rows lie in the span of the layer's inputs x_t. In the first
  layer these are the normed embeddings of the sample's tokens. A token whose input lies almost in the span of the rows of the
  changes of A in q, k and v was probably in the sample. (DAGER does this with full gradients: Petrov et al. 2024, 2405.15586.)
- copy: the attacker imitates a client with each of `PUBLIC` samples of its own and takes the one with the most similar update
  (cosine) for the client's.

Tokens that all prompts share are not counted. A share that says something is above that of the control: the same guess,
judged by a sample that was in no update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedmllm.models.encoded import Encoded
from fedmllm.rng import stream
from leaks.membership import Setting
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
FIGURES = ("span", "span, control", "copy", "copy, control", "answer", "answer, control", "question")
_LEAST = 1e-4
"""Singular values below this share of the largest are taken for rounding."""


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


def read_words(victim: Victim, warm: Tensor) -> dict[Setting, dict[str, list[float]]]:
    """setting -> figure -> its value for each target, a share of 1. The first sample of the first client is the target."""
    reader, rng = Reader(victim), stream(0, "leakage", "words")
    numbers = rng.permutation(len(victim.samples) - 512) + 512
    public, private = numbers[:PUBLIC], numbers[PUBLIC:]
    results: dict[Setting, dict[str, list[float]]] = {}
    imitated: dict[tuple[str, bool], Tensor] = {}
    for setting in SEEN:
        adapter, key = victim.initial if setting.first else warm, (setting.optimizer, setting.first)
        if key not in imitated:
            alone = [[victim.samples[i]] for i in public]
            imitated[key] = normalize(victim.updates(adapter, alone, setting.train), dim=1)
        figures = results[setting] = {name: [] for name in FIGURES}
        for target in range(TARGETS):
            size = setting.samples * setting.clients
            chosen = private[target * (size + 1) : (target + 1) * (size + 1)]
            *samples, outsider = [victim.samples[i] for i in chosen]
            seen = _seen(victim, adapter, samples, setting, rng)
            copied = victim.samples[public[int((imitated[key] @ seen).argmax())]]
            for values, value in zip(figures.values(), _judge(reader, seen, samples[0], copied, outsider), strict=True):
                values.append(value)
    return results


def _seen(victim: Victim, adapter: Tensor, samples: Sequence[Encoded], setting: Setting, rng: np.random.Generator) -> Tensor:
    clients = [samples[i :: setting.clients] for i in range(setting.clients)]
    updates = victim.updates(adapter, clients, setting.train)
    clip = float(updates.norm(dim=1).median())
    return noisy_sum(updates, clip, setting.noise, rng) if setting.noise else updates.sum(0)


def _judge(reader: Reader, seen: Tensor, target: Encoded, copied: Encoded, outsider: Encoded) -> tuple[float, ...]:
    of_target, of_outsider, of_copied = (reader.secret(sample) for sample in (target, outsider, copied))
    span = reader.by_span(seen, len(of_target))
    return (
        recovered(span, of_target),
        recovered(span, of_outsider),
        recovered(of_copied, of_target),
        recovered(of_copied, of_outsider),
        float(copied.answer == target.answer),
        float(copied.answer == outsider.answer),
        float(copied.prompt == target.prompt),
    )
