"""Tokenising: each distinct prompt is tokenised once, unless its tokens may depend on the content of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import COLORS
from fedmllm.config import ModelTable
from fedmllm.models.backbone import Backbone
from fedmllm.models.mllm import MLLM
from tiny_models import CLOSED, OPEN


def test_equal_questions_about_pictures_of_equal_size_are_tokenised_once(
    model: MLLM, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Sequence[Image.Image]]] = []
    process = Backbone.process

    def counted(self: Backbone, prompt: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        calls.append((prompt, images))
        return process(self, prompt, images)

    monkeypatch.setattr(Backbone, "process", counted)
    Image.new("RGB", (32, 64)).save(tmp_path / "narrow.png")
    talks = [
        OPEN[0],
        OPEN[0],
        replace(OPEN[0], answer="blue"),
        OPEN[0],
        replace(OPEN[0], image=False),
        replace(CLOSED, image=False),
    ]
    images = [dataset / "red.png", dataset / "blue.png", dataset / "red.png", tmp_path / "narrow.png", None, None]
    batch = model.encode(talks, images, 200)
    # The second differs only in the picture and the third only in the answer; the others in picture size, modality or text.
    assert [[image.size for image in images] for _, images in calls] == [[(64, 64)], [(32, 64)], [], []]
    assert batch[0].prompt is batch[1].prompt is batch[2].prompt
    assert [sample.pictures for sample in batch] == [(0,), (1,), (0,), (2,), (), ()]
    assert batch[2].answer != batch[0].answer
    assert model.encode(talks, images, 200)[3].prompt == batch[3].prompt
    assert len(calls) == 4


def test_a_processor_with_code_of_its_own_gets_every_picture(
    settings: ModelTable, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such code may derive tokens from the content of a picture."""
    trusting = MLLM.load(settings.model_copy(update={"trust_remote_code": True}), seed=0)
    first_pixels: list[tuple[int, ...]] = []
    process = Backbone.process

    def recorded(self: Backbone, prompt: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        first_pixels.extend(image.getpixel((0, 0)) for image in images)
        return process(self, prompt, images)

    monkeypatch.setattr(Backbone, "process", recorded)
    images = [dataset / "red.png", dataset / "blue.png", dataset / "red.png"]
    trusting.encode([OPEN[0]] * 3, images, 200)
    assert first_pixels == [COLORS["red"], COLORS["blue"], COLORS["red"]]


def test_inputs_that_may_contain_pixels_are_computed_from_the_picture(
    model: MLLM, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unregistered family may have another name for its pixel input."""
    process = Backbone.process

    def renamed(self: Backbone, prompt: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        inputs = process(self, prompt, images)
        return {"patches" if name == "pixel_values" else name: value for name, value in inputs.items()}

    monkeypatch.setattr(Backbone, "process", renamed)
    red, blue, again = model.encode([OPEN[0]] * 3, [dataset / f"{name}.png" for name in ("red", "blue", "red")], 200)
    assert not torch.equal(red.imagewise["patches"], blue.imagewise["patches"])
    assert torch.equal(red.imagewise["patches"], again.imagewise["patches"])
