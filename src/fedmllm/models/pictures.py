"""The pictures that a model has met, and what of them goes into a forward pass: cached vision features, or pixels."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fedmllm.data.images import Picture, decode, image_key, upright_size
from fedmllm.data.prompts import Conversation
from fedmllm.models import features
from fedmllm.models.backbone import Backbone

# Inputs that a cached picture replaces.
PIXELS = ("pixel_values", "pixel_attention_mask", "image_position_ids")


class Pictures:
    """Numbers distinct pictures; where `caches`, each goes through the frozen vision tower once."""

    def __init__(self, backbone: Backbone, caches: bool) -> None:
        self._backbone = backbone
        self._caches = caches
        self._numbers: dict[str, int] = {}
        self._images: list[Picture] = []
        self._known: dict[Picture, int] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._features: features.FeatureFile | None = None
        self._place: dict[int, int] = {}
        self._live: dict[int, Tensor] = {}
        # Whether `get_image_features` pools into one tensor or into a list; its annotation does not say, so ask it once.
        self._pooled_is_tensor = caches and self._pools_into_tensor()
        self._parameters = set(inspect.signature(backbone.model.forward).parameters)

    def number(self, image: Picture) -> int:
        if image not in self._known:  # a file is read once, however many samples show it
            number = self._numbers.setdefault(image_key(image), len(self._images))
            if number == len(self._images):
                self._images.append(image)
            self._known[image] = number
        return self._known[image]

    def size(self, picture: int) -> tuple[int, int]:
        """Width and height of the picture of this number, as it is shown."""
        if picture not in self._sizes:
            self._sizes[picture] = upright_size(self._images[picture])
        return self._sizes[picture]

    def prepare(self) -> int:
        """Put every picture met so far through the vision tower, or find that an earlier experiment did; how many were made."""
        if not self._caches or not self._images:
            return 0
        # In the order of their digests: another seed deals the same pictures out otherwise, and finds this file.
        ordered = sorted(self._numbers)
        name = features.digest_of([features.LAYOUT, self._backbone.vision_digest(), *ordered])
        path = features.cache_folder() / "features" / f"{name}.bin"
        pictures = [self._numbers[key] for key in ordered]
        found = features.open_features(path)
        self._features = found or features.write_features(path, self._encode(pictures))
        self._place = {picture: place for place, picture in enumerate(pictures)}
        return 0 if found else len(pictures)

    def inputs(self, pictures: Sequence[int]) -> dict[str, Any]:
        """Model inputs for the pictures of one batch, in the order of their places in it."""
        device = self._backbone.device
        if self._caches:
            records = [self._record(picture).to(device, self._backbone.dtype) for picture in pictures]
            return {"mm_encoder_outputs": {"image": features.join_output(records, self._pooled_is_tensor)}}
        raw = [self._pixel_inputs(decode(self._images[picture])) for picture in pictures]
        joined = self._join([{k: v for k, v in one.items() if k in PIXELS and k in self._parameters} for one in raw])
        return {k: v.to(device) for k, v in joined.items()}

    def tokens(self, pictures: Sequence[int]) -> Tensor:
        """What stands in the places of the image tokens of a batch: (tokens of all pictures, width)."""
        return torch.cat([self._record(picture)[0].flatten(0, -2) for picture in pictures]).to(self._backbone.dtype)

    def _pixel_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        inputs = self._backbone.process(self._backbone.prompt(Conversation("", "", True)), image)
        return {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask") and isinstance(v, Tensor)}

    def _join(self, inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Several pictures' inputs as those of one batch. Zeros fill up the tiles that a picture has fewer of."""
        dim = self._backbone.family.pixels_dim
        joined = {}
        for key in inputs[0]:
            tensors = [one[key] for one in inputs]
            if key == "pixel_values" and dim != 0:
                joined[key] = torch.cat(tensors, dim)
            else:
                joined[key] = torch.cat(_padded(tensors))
        return joined

    @torch.no_grad()
    def _image_features(self, inputs: dict[str, Tensor]) -> Any:
        """What the vision tower makes of pixel inputs, of which it is given those it takes."""
        get_features = self._backbone.model.get_image_features
        takes = inspect.signature(get_features).parameters
        if "pixel_values" not in takes:  # a wrapper that hands on whatever it gets; the model inside says what it takes
            get_features = self._backbone.model.base_model.get_image_features
            takes = inspect.signature(get_features).parameters
        return get_features(**{k: v.to(self._backbone.device) for k, v in inputs.items() if k in takes}, return_dict=True)

    def _encode(self, pictures: Sequence[int], batch: int = 32) -> Iterator[Tensor]:
        for start in range(0, len(pictures), batch):
            inputs = [self._pixel_inputs(decode(self._images[picture])) for picture in pictures[start : start + batch]]
            for group in _alike(inputs):
                yield from features.split_output(self._image_features(self._join(group)), len(group))

    def _pools_into_tensor(self) -> bool:
        inputs = self._pixel_inputs(Image.new("RGB", (64, 64), (200, 120, 40)))
        return isinstance(self._image_features(inputs).pooler_output, Tensor)

    def _record(self, picture: int) -> Tensor:
        if self._features is not None and picture in self._place:
            return self._features.record(self._place[picture])
        if picture not in self._live:  # a picture met after the file was made
            self._live[picture] = next(iter(self._encode([picture])))
        return self._live[picture]


def _padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros at the end of every dimension but the first, up to the largest of the tensors: (n, …) of equal …."""
    shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [(0, most - size) for most, size in zip(shape, tensor.shape[1:], strict=True)]
        padded.append(functional.pad(tensor, [amount for pair in reversed(missing) for amount in pair]))
    return padded


def _alike(inputs: Sequence[dict[str, Tensor]]) -> Iterator[list[dict[str, Tensor]]]:
    """Runs of neighbours whose tensors have the same shapes."""
    run: list[dict[str, Tensor]] = []
    for one in inputs:
        if run and {k: v.shape for k, v in run[0].items()} != {k: v.shape for k, v in one.items()}:
            yield run
            run = []
        run.append(one)
    if run:
        yield run
