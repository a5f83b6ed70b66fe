"""Inversion of pictures by matching updates: find the picture whose update is like the one that was seen.

The attacker knows the adapter that the client received, and even the sample's question and answer. It looks for the features
that the vision tower gives the text model, by Adam on the cosine distance of updates (Geiping et al. 2020, 2003.14053). Its
prior are `PUBLIC` pictures of its own: it starts at their mean and stays in the span of their first principal components. The
features become pixels by a ridge regression that is fitted to the same pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity, cross_entropy

from fedmllm.models.encoded import Encoded
from fedmllm.models.stack import Stack
from fedmllm.rng import stream
from leaks.victim import Victim, train_table

PUBLIC, TARGETS = 600, 4
COMPONENTS, STEPS, LR = 64, 300, 0.1
FIGURES = (
    "match at the start", "match at the end", "correlation", "correlation, control",
    "PSNR", "PSNR, control", "PSNR of the mean picture", "PSNR of the true features",
)  # fmt: skip


def gradients(victim: Victim, adapter: Tensor, samples: Sequence[Encoded], features: Tensor) -> Tensor:
    """(samples, entries): the gradient of each sample's loss if its picture has these features (samples, tokens · width).

    It can be differentiated again. `Victim.gradients` computes the same from the samples' own pictures.
    """
    model, mllm = victim.model.backbone.model, victim.model
    rows = [(*sample.prompt, *sample.answer) for sample in samples]
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[mllm.backbone.pad_id] * (length - len(row))] for row in rows])
    embedded = model.get_input_embeddings()(ids).detach()
    embedded = embedded.masked_scatter((ids == model.config.image_token_id).unsqueeze(-1), features)
    stack = Stack(mllm.adapter, [victim.tensors(adapter)] * len(samples), list(mllm.adapter.parameters))
    with mllm.using(stack, len(samples)), sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        stack.begin([(1, length)] * len(samples))
        hidden = model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state
        losses = []
        for row, sample in zip(hidden, samples, strict=True):
            last = len(sample.prompt) - 1
            logits = model.get_output_embeddings()(row[last : last + len(sample.answer)])
            losses.append(cross_entropy(logits, torch.tensor(sample.answer)))
        factors = [stack.current[name] for name in mllm.adapter.parameters]
        parts = torch.autograd.grad(torch.stack(losses).sum(), factors, create_graph=True)
    return torch.cat([part.reshape(len(samples), -1) for part in parts], dim=1)


def mismatch(gradient: Tensor, updates: Tensor, optimizer: str) -> Tensor:
    """(samples): 1 − the cosine of the seen updates and those that the gradients would cause. The first step of AdamW is the
    sign of the gradient; where that is close to 0, a smooth sign is used, which has a derivative."""
    caused = -gradient
    if optimizer == "adamw":
        caused = caused / (caused.abs() + 0.1 * caused.detach().abs().mean(dim=1, keepdim=True))
    return 1 - cosine_similarity(caused, updates)


class Prior:
    """What the attacker knows of pictures."""

    def __init__(self, features: Tensor, pixels: Tensor, components: int = COMPONENTS) -> None:
        self.mean, self.mean_pixels = features.mean(0), pixels.mean(0)
        self._centred = features - self.mean
        _, singular, basis = torch.linalg.svd(self._centred, full_matrices=False)
        self.basis = basis[:components] * singular[:components, None] / len(features) ** 0.5
        """(components, entries): each as long as its standard deviation."""
        kernel = self._centred @ self._centred.T
        ridge = 0.01 * kernel.diagonal().mean() * torch.eye(len(kernel))
        self._decoder = torch.linalg.solve(kernel + ridge, pixels - self.mean_pixels)

    def pixels(self, features: Tensor) -> Tensor:
        return (self.mean_pixels + (features - self.mean) @ self._centred.T @ self._decoder).clamp(0, 1)


def psnr(picture: Tensor, true: Tensor) -> Tensor:
    """(pictures): the peak signal-to-noise ratio in dB of pixels (pictures, n) between 0 and 1."""
    return -10 * torch.log10(((picture - true) ** 2).mean(dim=1))


def match_pictures(victim: Victim, warm: Tensor) -> dict[str, dict[str, list[float]]]:
    """optimizer -> figure -> its value for each target, one sample of one client after one step."""
    numbers = (stream(0, "leakage", "pictures").permutation(len(victim.samples) - 512) + 512).tolist()
    public, private, outside = numbers[:PUBLIC], numbers[PUBLIC : PUBLIC + TARGETS], numbers[-TARGETS:]
    prior = Prior(victim.features(public), victim.pixels(public))
    samples, pixels, others = [victim.samples[i] for i in private], victim.pixels(private), victim.pixels(outside)
    true = victim.features(private)
    results = {}
    for optimizer in ("sgd", "adamw"):
        updates = victim.updates(warm, [[sample] for sample in samples], train_table(optimizer))
        coefficients = torch.zeros(TARGETS, COMPONENTS, requires_grad=True)
        adam = torch.optim.Adam([coefficients], LR)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
        matches = []
        for _ in range(STEPS):
            gradient = gradients(victim, warm, samples, prior.mean + coefficients @ prior.basis)
            distances = mismatch(gradient, updates, optimizer)
            matches.append(1 - distances.detach())
            (coefficients.grad,) = torch.autograd.grad(distances.sum(), coefficients)
            adam.step()
            schedule.step()
        found = prior.mean + coefficients.detach() @ prior.basis
        picture = prior.pixels(found)
        values = (
            matches[0],
            matches[-1],
            cosine_similarity(found - prior.mean, true - prior.mean),
            cosine_similarity(found - prior.mean, victim.features(outside) - prior.mean),
            psnr(picture, pixels),
            psnr(picture, others),
            psnr(prior.mean_pixels.expand_as(pixels), pixels),
            psnr(prior.pixels(true), pixels),
        )
        results[optimizer] = {name: value.tolist() for name, value in zip(FIGURES, values, strict=True)}
    return results
