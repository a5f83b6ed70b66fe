"""The pictures that a model knows, and their inputs to a forward pass: cached vision features or pixels.

In a family to which a picture is something else beside others (`Family.alone_differs`), it has two numbers and two records.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fedmllm.data.files import EntryError
from fedmllm.data.images import Picture, decode, image_key, upright_size
from fedmllm.data.prompts import Conversation
from fedmllm.models import features
from fedmllm.models.backbone import Backbone
from fedmllm.models.halving import Limits
from fedmllm.models.live_bytes import LiveBytes
from fedmllm.progress import ProgressCallback, no_progress

PIXELS = ("pixel_values", "pixel_attention_mask", "image_position_ids")
"""Model inputs that cached features replace."""
Shown = tuple[Picture, bool]
"""A picture, and whether it is processed as one beside others."""


class Pictures:
    """Numbers distinct pictures. If `caches`, each passes through the frozen vision tower once."""

    def __init__(self, backbone: Backbone, caches: bool, limits: Limits) -> None:
        self._backbone, self._limits = backbone, limits
        self._caches = caches
        self._numbers: dict[str, int] = {}
        self._images: list[Shown] = []
        self._number_of: dict[Shown, int] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._features: features.FeatureFile | None = None
        self._index: dict[int, int] = {}
        self._uncached: dict[int, Tensor] = {}
        self._altered: dict[int, dict[str, Tensor]] = {}
        # Whether `get_image_features` pools into one tensor or into a list; its annotation does not say, so try it once.
        self._pooled_is_tensor = caches and self._pools_into_tensor()
        self._parameters = set(inspect.signature(backbone.model.forward).parameters)

    def numbers(self, images: Sequence[Picture]) -> tuple[int, ...]:
        """The numbers of the pictures of one prompt."""
        return tuple(self._number((image, self._beside(len(images)))) for image in images)

    def _number(self, shown: Shown) -> int:
        if shown not in self._number_of:  # a file is read once, however many samples show it
            number = self._numbers.setdefault(image_key(shown[0]) + "+" * shown[1], len(self._images))
            if number == len(self._images):
                self._images.append(shown)
            self._number_of[shown] = number
        return self._number_of[shown]

    def _beside(self, pictures: int) -> bool:
        return pictures > 1 and self._backbone.family.alone_differs

    @contextmanager
    def forgotten(self) -> Iterator[None]:
        """Forget afterwards what is first numbered inside, which no file of features then includes."""
        known = len(self._images)
        try:
            yield
        finally:
            del self._images[known:]
            self._numbers = {key: number for key, number in self._numbers.items() if number < known}
            self._number_of = {shown: number for shown, number in self._number_of.items() if number < known}
            self._sizes = {number: size for number, size in self._sizes.items() if number < known}
            self._uncached = {number: record for number, record in self._uncached.items() if number < known}

    def size(self, picture: int) -> tuple[int, int]:
        """Width and height of the picture with this number, in its displayed orientation."""
        if picture not in self._sizes:
            self._sizes[picture] = upright_size(self._images[picture][0])
        return self._sizes[picture]

    def prepare(self, progress: ProgressCallback = no_progress) -> int:
        """Compute the features of every picture numbered so far, unless an earlier experiment did; how many were computed."""
        if not self._caches or not self._images:
            return 0
        # In the order of their digests: another seed, with the same pictures in another order, finds the same file.
        ordered = sorted(self._numbers)
        name = features.digest_of([features.LAYOUT, self._backbone.vision_digest(), *ordered])
        path = features.cache_folder() / "features" / f"{name}.bin"
        pictures = [self._numbers[key] for key in ordered]
        cached = features.open_features(path)
        self._features = cached or features.write_features(path, _counted(self._encode(pictures), len(pictures), progress))
        self._index = {picture: index for index, picture in enumerate(pictures)}
        return 0 if cached else len(pictures)

    def inputs(self, pictures: Sequence[int]) -> dict[str, Any]:
        """Model inputs for the pictures of one batch, in the order of its rows."""
        device = self._backbone.device
        if self._caches and not self._altered:
            records = [record.to(device, self._backbone.dtype) for record in self._records(pictures)]
            return {"mm_encoder_outputs": {"image": features.join_output(records, self._pooled_is_tensor)}}
        joined = self._join([self._altered.get(p) or self.pixels(self.image(p), 1 + self._images[p][1]) for p in pictures])
        return {k: v.to(device) for k, v in joined.items()}

    def image(self, picture: int) -> Image.Image:
        """The picture with this number."""
        return decode(self._images[picture][0])

    def pixels(self, image: Image.Image, of: int = 1) -> dict[str, Tensor]:
        """The processor's output for a picture, one `of` several in its prompt, as far as it goes through the vision tower."""
        inputs = self._pixel_inputs(image, self._beside(of))
        return {k: v for k, v in inputs.items() if k in PIXELS and k in self._parameters}

    @contextmanager
    def altered(self, pictures: Sequence[dict[str, Tensor]]) -> Iterator[list[int]]:
        """Numbers, valid inside, for pictures that are given as what `pixels` returns. They pass through the vision tower, with
        gradients, and never through the cache; no other picture can be shown inside."""
        self._altered = {-1 - index: inputs for index, inputs in enumerate(pictures)}
        try:
            yield list(self._altered)
        finally:
            self._altered = {}

    def tokens(self, pictures: Sequence[int]) -> Tensor:
        """The features that replace the image tokens of a batch: (tokens of all pictures, width)."""
        return torch.cat([record[0].flatten(0, -2) for record in self._records(pictures)]).to(self._backbone.dtype)

    def tower_bytes(self, picture: int) -> int:
        """Bytes that one pass of this picture through the vision tower takes, counted in such a pass."""
        image, beside = self._images[picture]
        inputs = self._pixel_inputs(decode(image), beside)
        with LiveBytes() as count:
            self._image_features(inputs)
        return int(count.peak * torch.float32.itemsize // self._backbone.dtype.itemsize)

    def _pixel_inputs(self, image: Image.Image, beside: bool) -> dict[str, Tensor]:
        images = [image, image] if beside else [image]
        inputs = self._backbone.process(self._backbone.prompt(Conversation("", "", len(images))), images)
        inputs = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask") and isinstance(v, Tensor)}
        return {k: v[:1] for k, v in inputs.items()} if beside else inputs

    def _join(self, inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Join the inputs of several pictures into those of one batch. Pictures with fewer tiles are padded with zeros."""
        dim = self._backbone.family.pixels_dim
        tensors = {key: [picture[key] for picture in inputs] for key in inputs[0]}
        return {k: torch.cat(t, dim) if k == "pixel_values" and dim else torch.cat(_padded(t)) for k, t in tensors.items()}

    @torch.no_grad()
    def _image_features(self, inputs: dict[str, Tensor]) -> Any:
        """The vision tower's output for those of the inputs that it accepts."""
        get_features = self._backbone.model.get_image_features
        accepted = inspect.signature(get_features).parameters
        if "pixel_values" not in accepted:  # a wrapper that forwards all arguments; the model inside declares them
            get_features = self._backbone.model.base_model.get_image_features
            accepted = inspect.signature(get_features).parameters
        return get_features(**{k: v.to(self._backbone.device) for k, v in inputs.items() if k in accepted}, return_dict=True)

    def _encode(self, pictures: Sequence[int], batch: int = 32) -> Iterator[Tensor]:
        """One record per picture. It is empty if the processor refuses the picture, which no encoded sample then shows."""
        for start in range(0, len(pictures), batch):
            inputs = [self._accepted_inputs(picture) for picture in pictures[start : start + batch]]
            for _, group in groupby(inputs, key=lambda picture: {k: v.shape for k, v in picture.items()}):
                equal = list(group)
                if equal[0]:
                    yield from self._limits.in_parts(self._limits.pictures, equal, self._tower, lambda: False)
                else:
                    yield from (torch.empty(0) for _ in equal)

    def _tower(self, inputs: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        return features.split_output(self._image_features(self._join(inputs)), len(inputs))

    def _accepted_inputs(self, picture: int) -> dict[str, Tensor]:
        try:
            image, beside = self._images[picture]
            return self._pixel_inputs(decode(image), beside)
        except EntryError:
            return {}

    def _pools_into_tensor(self) -> bool:
        inputs = self._pixel_inputs(Image.new("RGB", (64, 64), (200, 120, 40)), False)
        return isinstance(self._image_features(inputs).pooler_output, Tensor)

    def _records(self, pictures: Sequence[int]) -> list[Tensor]:
        newer = [p for p in dict.fromkeys(pictures) if p not in self._index and p not in self._uncached]
        self._uncached |= zip(newer, self._encode(newer), strict=True)  # their numbers are newer than the file
        file = self._features
        return [file.record(self._index[p]) if file and p in self._index else self._uncached[p] for p in pictures]


def _counted(records: Iterator[Tensor], count: int, progress: ProgressCallback) -> Iterator[Tensor]:
    for number, record in enumerate(records, start=1):
        progress("encoding pictures", number, count, "")
        yield record


def _padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of equal shape except the first dimension, padded with zeros at the end of each dimension to the largest size."""
    shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    missing = [[largest - size for largest, size in zip(shape, t.shape[1:], strict=True)] for t in tensors]
    return [functional.pad(t, [n for m in reversed(sizes) for n in (0, m)]) for t, sizes in zip(tensors, missing, strict=True)]
