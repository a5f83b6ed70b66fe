from __future__ import annotations

import pytest

from fedmllm.data.prompts import prompts, published_wording, render
from fedmllm.data.samples import Modality
from helpers import sample

BOTH: frozenset[Modality] = frozenset(("image", "text"))
IMAGE: frozenset[Modality] = frozenset(("image",))
TEXT: frozenset[Modality] = frozenset(("text",))
NOTHING: frozenset[Modality] = frozenset()

MEME = sample(
    text="look who is here", question="is this hateful?", answer="hateful", choices=("fine", "hateful"), lettered=True
)
QUESTION = sample(text="A red circle is above a blue rectangle.", question="what color is the circle?", answer="red")

OPTIONS = "(A) fine\n(B) hateful\nAnswer with the letter of the right option."

LETTERED = [
    ("modality-specific", BOTH, f"Text: look who is here\nBased on the image and the text, is this hateful?\n{OPTIONS}"),
    ("modality-specific", IMAGE, f"Based on the image, is this hateful?\n{OPTIONS}"),
    ("modality-specific", TEXT, f"Text: look who is here\nBased on the text, is this hateful?\n{OPTIONS}"),
    ("modality-specific", NOTHING, f"is this hateful?\n{OPTIONS}"),
    ("modality-agnostic", BOTH, f"Text: look who is here\nWithout considering the modality, is this hateful?\n{OPTIONS}"),
    ("modality-agnostic", IMAGE, f"Without considering the modality, is this hateful?\n{OPTIONS}"),
    ("modality-agnostic", TEXT, f"Text: look who is here\nWithout considering the modality, is this hateful?\n{OPTIONS}"),
    ("modality-agnostic", NOTHING, f"Without considering the modality, is this hateful?\n{OPTIONS}"),
]

BARE = [
    (BOTH, "A red circle is above a blue rectangle.\nwhat color is the circle?"),
    (IMAGE, "what color is the circle?"),
    (TEXT, "A red circle is above a blue rectangle.\nwhat color is the circle?"),
    (NOTHING, "what color is the circle?"),
]


@pytest.mark.parametrize(("strategy", "visible", "user"), LETTERED)
def test_golden_prompts_of_a_lettered_sample(strategy: str, visible: frozenset[Modality], user: str) -> None:
    conversation = render(MEME, visible, prompts.build(strategy, {}))
    assert conversation.user == user
    assert conversation.answer == "(B) hateful"
    assert conversation.options == ("(A) fine", "(B) hateful")
    assert conversation.image == ("image" in visible)


INSTRUCTION = "Select the best answer to the following multiple-choice question"
PUBLISHED = [
    ("modality-agnostic", visible, ", without considering the modality") for visible in (BOTH, IMAGE, TEXT, NOTHING)
] + [
    ("modality-specific", BOTH, " based on the text and image"),
    ("modality-specific", IMAGE, " based on the image"),
    ("modality-specific", TEXT, " based on the text"),
    ("modality-specific", NOTHING, ""),
]


@pytest.mark.parametrize(("strategy", "visible", "clause"), PUBLISHED)
def test_the_published_wording_has_the_clause_twice(strategy: str, visible: frozenset[Modality], clause: str) -> None:
    shown = "Text: look who is here\n" if "text" in visible else ""
    expected = f"{shown}{INSTRUCTION}{clause}.\nis this hateful{clause}?\n{OPTIONS}"
    assert render(MEME, visible, prompts.build(strategy, {"wording": "published"})).user == expected


@pytest.mark.parametrize(("question", "worded"), [("name it.", "name it, c."), ("which", "which, c"), ("why?!", "why?!, c")])
def test_the_clause_comes_before_the_end_of_a_question(question: str, worded: str) -> None:
    assert published_wording(question, ", c") == f"{INSTRUCTION}, c.\n{worded}"


@pytest.mark.parametrize("strategy", prompts.names())
@pytest.mark.parametrize(("visible", "user"), BARE)
def test_golden_prompts_of_a_bare_question(strategy: str, visible: frozenset[Modality], user: str) -> None:
    conversation = render(QUESTION, visible, prompts.build(strategy, {}))
    assert conversation.user == user
    assert conversation.answer == "red"
    assert conversation.options == ()
    assert conversation.image == ("image" in visible)


def test_the_goldens_are_of_registered_strategies() -> None:
    assert {strategy for strategy, _, _ in LETTERED} <= set(prompts.names())


def test_missing_modalities_cannot_be_seen() -> None:
    conversation = render(sample("s", "text", question="what?"), BOTH, prompts.build("modality-specific", {}))
    assert (conversation.image, conversation.user) == (False, "a text\nwhat?")
    lettered = sample("s", "image", question="what?", answer="a", choices=("a", "b"), lettered=True)
    conversation = render(lettered, BOTH, prompts.build("modality-specific", {}))
    assert conversation.user.startswith("Based on the image, what?\n(A) a\n(B) b\n")


def test_choices_that_are_not_lettered_are_not_shown() -> None:
    conversation = render(sample("s", "image", choices=("yes", "no")), BOTH, prompts.build("modality-agnostic", {}))
    assert conversation.user == "what is it?"
    assert conversation.options == ("yes", "no")
    assert conversation.answer == "yes"


def test_choices_without_a_question_ask_for_the_right_one() -> None:
    conversation = render(
        sample("s", "image", question="", choices=("yes", "no"), lettered=True), BOTH, prompts.build("modality-agnostic", {})
    )
    assert conversation.user.startswith("Without considering the modality, which option is right?\n(A) yes\n(B) no\n")


def test_letters_reach_to_z() -> None:
    choices = tuple(f"c{i}" for i in range(26))
    conversation = render(sample(answer="c25", choices=choices, lettered=True), BOTH, prompts.build("modality-agnostic", {}))
    assert conversation.answer == "(Z) c25"
    assert "\n(Z) c25\n" in conversation.user


def test_the_picture_comes_before_the_text_in_the_users_turn() -> None:
    strategy = prompts.build("modality-agnostic", {})
    words = {"type": "text", "text": BARE[0][1]}
    assert render(QUESTION, BOTH, strategy).messages() == [{"role": "user", "content": [{"type": "image"}, words]}]
    assert render(QUESTION, TEXT, strategy).messages() == [{"role": "user", "content": [words]}]


def test_a_text_that_needs_no_question_stands_alone() -> None:
    card = sample(kind="text", text="What is a sign?", question="", answer="This.")
    assert render(card, TEXT, prompts.build("modality-agnostic", {})).user == "What is a sign?"
