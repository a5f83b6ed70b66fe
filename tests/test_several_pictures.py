"""Samples with several pictures: every part shows, hides, checks and changes all of them; one picture stays what it was."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import run
from fedmllm.config import ModelTable
from fedmllm.data.corruptions import corrupted
from fedmllm.data.files import EntryError
from fedmllm.data.images import decode
from fedmllm.data.loading import read_split
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.data.notes import shared_rows
from fedmllm.data.prompts import Conversation, prompts, render
from fedmllm.data.samples import Sample
from fedmllm.data.scenarios import IMAGE, TEXT
from fedmllm.models.live import LivePicture
from fedmllm.models.mllm import MLLM
from fedmllm.models.scoring import option_scores
from helpers import png, sample, task

RED, BLUE, GREEN = png(), png((30, 30, 220)), png((30, 200, 30))
TALK = Conversation("which color is it?", "red", image=2)


def several(*pictures: bytes, **fields: Any) -> Sample:
    return replace(sample(), image=pictures, **fields)


def test_one_picture_in_a_tuple_is_that_picture() -> None:
    assert several(RED) == replace(sample(), image=RED)
    assert several() == sample(kind="text")
    assert several(RED, BLUE).pictures == (RED, BLUE)
    assert (several(RED).pictures, several().pictures) == ((RED,), ())


def test_all_pictures_are_shown_or_none() -> None:
    two, strategy = several(RED, BLUE), prompts.build("modality-agnostic", {})
    assert two.modalities == IMAGE | TEXT
    assert two.showing(TEXT) == several()
    assert two.showing(IMAGE).pictures == (RED, BLUE)
    parts = {visible: render(two, visible, strategy).messages()[0]["content"] for visible in (IMAGE, TEXT)}
    assert [part["type"] for part in parts[IMAGE]] == ["image", "image", "text"]  # type: ignore[attr-defined]
    assert [part["type"] for part in parts[TEXT]] == ["text"]  # type: ignore[attr-defined]
    manifests = [Manifest.of([Holding("s", 0, s.modalities)], 1).digest() for s in (two, several(RED))]
    assert manifests[0] == manifests[1], "the manifest says which modalities are visible, and not how many pictures there are"


def test_every_picture_is_corrupted() -> None:
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        Image.effect_noise((40, 40), 80).convert("RGB").save(file, "PNG")
    clean = several(*(file.getvalue() for file in files))
    for kind in ("blur", "occlusion"):
        worse = corrupted(clean, "image", kind, 3, 0)
        assert worse.pictures[0] == corrupted(replace(clean, image=clean.pictures[0]), "image", kind, 3, 0).image
        for before, after in zip(clean.pictures, worse.pictures, strict=True):
            assert np.abs(np.asarray(decode(before), int) - np.asarray(decode(after), int)).mean() > 1
    assert corrupted(clean, "image", "blur", 0, 0) is clean


@pytest.mark.parametrize(
    ("picture", "kind", "what"),
    [
        (b"no picture", "undecodable picture", "picture 2 of 2: the picture (in memory) cannot be decoded ("),
        (Path("missing.png"), "missing picture", "picture 2 of 2: the picture missing.png is missing"),
    ],
)
def test_a_sample_is_bad_if_one_of_its_pictures_is(picture: Any, kind: str, what: str) -> None:
    loaded = read_split(task(several(RED, picture), several(RED, BLUE, id="good")), "train")
    assert [s.id for s in loaded.samples] == ["good"]
    assert [(p.kind, p.what[: len(what)]) for p in loaded.problems] == [(kind, what)]


def test_a_picture_of_too_many_pixels_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    loaded = read_split(task(several(RED, BLUE)), "train")
    assert [(p.kind, p.what[:15]) for p in loaded.problems] == [("picture too large", "picture 1 of 2:")]


def test_rows_are_shared_if_all_pictures_are_the_same_in_the_same_order() -> None:
    train = [several(RED, BLUE), several(GREEN)]
    assert shared_rows(train, [several(RED, BLUE), several(GREEN)]) == 2
    assert shared_rows(train, [several(BLUE, RED), several(RED, GREEN), several(RED), several(RED, BLUE, GREEN)]) == 0


def test_features_are_kept_by_picture(settings: ModelTable) -> None:
    """Two prompts that share a picture need it once, and the file is that of prompts with one picture each."""
    model, other = MLLM.load(settings, seed=0), MLLM.load(settings, seed=0)
    encoded = model.encode([TALK, TALK], [(RED, BLUE), (BLUE, GREEN)], 300)
    assert [e.pictures for e in encoded] == [(0, 1), (1, 2)]
    assert model.prepare_features() == 3
    other.encode([replace(TALK, image=1)] * 3, [GREEN, RED, BLUE], 300)
    assert other.prepare_features() == 0, "the same file"
    again, swapped, twice = model.encode([TALK] * 3, [(RED, BLUE), (BLUE, RED), (RED, RED)], 300)
    with torch.no_grad():
        losses = [model.loss([e]).item() for e in (encoded[0], again, swapped, twice)]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_what_a_model_cannot_show_is_a_bad_sample(model: MLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = (RED,) * 5
    (encoded,) = model.encode([replace(TALK, image=5)], [shown], 600)
    with pytest.raises(
        EntryError, match="it shows 5 pictures; show fewer of them, raise the limit or shorten the text"
    ) as caught:
        model.encode([replace(TALK, image=5)], [shown], encoded.length - 1)
    assert caught.value.kind == "prompt too long"
    family = replace(model.backbone.family, one_picture="its second would be ignored")
    monkeypatch.setattr(model, "backbone", replace(model.backbone, family=family))
    model.encode([replace(TALK, image=1), replace(TALK, image=0)], [RED, shown], 600)
    with pytest.raises(EntryError, match=r"has 5 pictures, and the model can be shown one \(its second would be") as caught:
        model.encode([replace(TALK, image=5)], [shown], 600)
    assert caught.value.kind == "picture the model refuses"


def test_gradients_with_respect_to_all_pictures(model: MLLM) -> None:
    question = model.encode_one(replace(TALK, options=("red", "blue")), (RED, BLUE), 300, asks=True)
    live = LivePicture(model, question)
    assert live.scores(live.pixels[None])[0] == pytest.approx(option_scores(model, [question])[0], abs=1e-4)
    gradients = live.gradients(np.stack([live.pixels] * 2), 0)
    halves = np.abs(gradients.reshape(2, 2, -1)).max(axis=2)
    assert halves.min() > 0, "of each picture"
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-3, abs=1e-6)


def test_a_run_with_lists_of_pictures(
    write_experiment: Callable[..., Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of them are corrupted."""
    monkeypatch.chdir(shutil.copytree(dataset, tmp_path / "several"))
    for path in Path().glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [line | ({"images": [name, "blue.png"]} if (name := line.pop("image", None)) else {}) for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["task.train=train.jsonl", "task.test=test.jsonl", "scenario.name=noisy"]
    result = run("run", write_experiment(rounds=1), *[part for word in words for part in ("--set", word)])
    assert result["metrics"]["image"]["n"] == 10
