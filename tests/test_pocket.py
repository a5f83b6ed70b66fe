"""The shipped model and the recipe that made it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from fedmllm.config import ModelTable
from fedmllm.data.prompts import Conversation
from fedmllm.models.backbone import POCKET
from fedmllm.models.mllm import MLLM
from fedmllm.models.pocket import architecture as parts
from fedmllm.models.pocket import pretrain
from fedmllm.models.pocket.questions import ask_scene, ask_text, lettered
from fedmllm.models.pocket.scenes import COLORS, SHAPES, Scene, Thing, cells, draw_scene
from fedmllm.rng import stream

SMALL = pretrain.Recipe(vision_steps=2, vision_rows=4, answer_steps=2, presence_steps=1, rows=3, questions=2, save_every=2)


def test_the_package_is_small_and_complete() -> None:
    weights = POCKET / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    assert {"config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja", "README.md"} <= {
        p.name for p in POCKET.iterdir()
    }


def test_it_loads_with_plain_transformers_and_answers() -> None:
    model = AutoModelForImageTextToText.from_pretrained(POCKET)
    processor = AutoProcessor.from_pretrained(POCKET)
    assert model.dtype is torch.float32
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 6e6
    scene = draw_scene(stream(0, "a picture that no step drew"), 1)
    prompt = processor.apply_chat_template(
        Conversation("Name the color of the object.", "", True).messages(), add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[prompt], images=[[scene.image]], return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    said = processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    assert said in COLORS


def test_it_sees_colors_and_shapes(tmp_path: Path) -> None:
    """Far above guessing (1 in 12, 1 in 6) on pictures of one thing that no step of the recipe drew."""
    model = MLLM.load(ModelTable(), seed=0)
    talks, images = [], []
    for i in range(40):
        scene = draw_scene(stream(99, "held out", i), 1)
        path = tmp_path / f"{i}.png"
        scene.image.save(path)
        for question, answer in (
            ("Name the color of the object.", scene.things[0].color),
            ("Name the shape of the object.", scene.things[0].shape),
        ):
            talks.append(Conversation(question, answer, True))
            images.append(path)
    said = model.generate(model.encode(talks, images, 200), 3)
    right = np.array([s == t.answer for s, t in zip(said, talks, strict=True)]).reshape(-1, 2).mean(axis=0)
    assert right[0] > 0.7
    assert right[1] > 0.5


def test_the_processor_and_the_recipe_see_the_same_pixels() -> None:
    image = draw_scene(stream(0, "pixels"), 3).image
    processor = AutoProcessor.from_pretrained(POCKET)
    theirs = processor(text=["<image>"], images=[[image]], return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(theirs.numpy(), parts.pixels([image]), atol=1e-5)


def test_the_recipes_blocks_are_the_prompts_that_users_send() -> None:
    """A block of a packed row must give the loss of the same conversation alone, through the chat template."""
    tokenizer = parts.build_tokenizer(documents=40, vocabulary=400)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = parts.build_model(parts.build_config(tokenizer, num_hidden_layers=2)).eval()
    recipe = replace(SMALL, rows=1, text_share=0.0)
    batch = pretrain.make_batch(tokenizer, recipe, step=3)
    packed, _ = pretrain.losses_of(model, pretrain.CellHeads(160), batch)
    rng = stream(recipe.seed, "row", 3, 0)
    rng.random()
    scene = draw_scene(rng, 1)
    processor = parts.build_processor(tokenizer)
    losses, count = 0.0, 0
    for question, answer in ask_scene(scene, rng, recipe.questions):
        messages = Conversation(question, answer, True).messages()
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(
            text=[f"{prompt} {answer}{parts.END}"], images=[[scene.image]], return_tensors="pt", add_special_tokens=False
        )
        ids = inputs["input_ids"]
        said = len(tokenizer(f" {answer}{parts.END}", add_special_tokens=False)["input_ids"])
        labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - said, ids, -100)
        losses += model(**inputs, labels=labels).loss.item() * said
        count += said
    assert packed.item() == pytest.approx(losses / count, rel=1e-4)


def test_a_recipe_cut_short_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = parts.build_tokenizer(documents=40, vocabulary=400)
    monkeypatch.setattr(parts, "build_tokenizer", lambda seed: tokenizer)
    pretrain.pretrain(SMALL, tmp_path / "whole")
    losses_of, calls = pretrain.losses_of, 0

    def fail_once(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return losses_of(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain, "losses_of", fail_once)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(SMALL, tmp_path / "cut")
    pretrain.pretrain(SMALL, tmp_path / "cut")
    files = [(tmp_path / name / "pocket" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="another recipe"):
        pretrain.pretrain(replace(SMALL, lr=1.0), tmp_path / "cut")


def test_cells_say_where_things_are() -> None:
    things = (Thing("circle", "red", 8, 8, 5), Thing("star", "blue", 40, 56, 10))
    colors, shapes = cells(Scene(things, None, Image.new("RGB", (64, 64))), 4)
    assert (colors[0], shapes[0]) == (list(COLORS).index("red") + 1, SHAPES.index("circle") + 1)
    assert (colors[14], shapes[14]) == (list(COLORS).index("blue") + 1, SHAPES.index("star") + 1)
    assert colors[13] == colors[9] == colors[10] == -100  # the star reaches into these
    assert colors[3] == shapes[3] == 0


def test_answers_are_true_and_balanced() -> None:
    """Yes and no come about equally often, and a lettered answer repeats its option."""
    said = []
    for i in range(300):
        rng = stream(1, i)
        pairs = [*ask_scene(draw_scene(rng, 3), rng, 6), ask_text(rng)]
        said += [answer for _, answer in pairs if answer in ("yes", "no")]
        for question, answer in pairs:
            if answer.startswith("("):
                assert f"{answer}\n" in question
    assert 0.4 < said.count("yes") / len(said) < 0.6
    question, answer = lettered(("Which?", "red"), ["red", "blue", "green"], stream(0, "letters"))
    assert answer.endswith(") red")
    assert f"{answer}\n" in question
