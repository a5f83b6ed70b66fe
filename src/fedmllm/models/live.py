"""A question about pictures, put to the model with any pixels through the vision tower, and gradients with respect to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedmllm.errors import DataError
from fedmllm.models.encoded import Encoded
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_log_probabilities

_ROUNDING = 0.01
"""How far outside of black and white a processor's resizing and rounding may take a pixel."""


class LivePicture:
    """One closed question. The current adapter answers.

    `pixels`: the pictures as the processor resizes and cuts them, one after another, each as its flattened `pixel_values`, from
    0 (black) to 1 (white). What a picture of the same size does not change, such as padding, is 0.

    The normalisation is measured, so that no family needs its own rule: the processor's outputs for a black and for a white
    picture are the ends of the range of every entry.
    """

    def __init__(self, model: MLLM, question: Encoded) -> None:
        """Raises DataError if the processor does more to pixels than scale them."""
        assert question.pictures
        images = [model.pictures.image(number) for number in question.pictures]
        self._model, self._question, self._inputs = (
            model,
            question,
            [model.pictures.pixels(image, len(images)) for image in images],
        )
        self._black, white = (
            _flat([model.pictures.pixels(Image.new("RGB", image.size, colour), len(images)) for image in images])
            for colour in ("black", "white")
        )
        self._span = white - self._black
        steady = self._span == 0
        own = (_flat(self._inputs) - self._black) / self._span.masked_fill(steady, 1)
        beyond = torch.where(steady, own.abs(), (own - 0.5).abs() - 0.5)
        if bool((self._span < 0).any()) or float(beyond.max()) > _ROUNDING:
            raise DataError(
                "The model's processor does more to pixels than scale them, so that no budget holds and no picture is attacked."
            )
        self.pixels: NDArray[np.float32] = own.clamp(0, 1).masked_fill(steady, 0).numpy()

    @torch.no_grad()
    def scores(self, pixels: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n, options): the log-probabilities of the options for n variants of `pixels`."""
        return self._log_probabilities(torch.from_numpy(pixels)).double().cpu().numpy()

    def gradients(self, pixels: NDArray[np.float32], option: int) -> NDArray[np.float32]:
        """(n, …): the gradients of minus the log-probability of an option. Raises DataError if the model gives none."""
        leaf = torch.from_numpy(pixels).requires_grad_()
        with torch.enable_grad():
            loss = -self._log_probabilities(leaf)[:, option].sum()
            gradients = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
        if gradients is None or not bool(gradients.isfinite().all()):
            raise DataError("The model gives no finite gradient with respect to its pixels, so that no picture is attacked.")
        return gradients.numpy()

    def _log_probabilities(self, pixels: Tensor) -> Tensor:
        shapes = [picture["pixel_values"].shape for picture in self._inputs]
        variants = [(self._black + self._span * row).split([shape.numel() for shape in shapes]) for row in pixels]
        inputs = [
            unaltered | {"pixel_values": values.view(shape)}
            for variant in variants for unaltered, values, shape in zip(self._inputs, variant, shapes, strict=True)
        ]  # fmt: skip
        with self._model.pictures.altered(inputs) as numbers:
            starts = range(0, len(numbers), len(shapes))
            batch = [replace(self._question, pictures=tuple(numbers[start : start + len(shapes)])) for start in starts]
            return torch.stack(option_log_probabilities(self._model, batch))


def _flat(pictures: Sequence[dict[str, Tensor]]) -> Tensor:
    """(values of all pictures,): their `pixel_values` one after another."""
    return torch.cat([picture["pixel_values"].float().flatten() for picture in pictures])
