"""The wording of questions: small helpers, and multiple choice with lettered options as in the prompts of the package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Pair = tuple[str, str]
"""(question, answer)"""
LETTERS = "ABCDEFGHI"
LETTER_RULE = "Answer with the letter of the right option."
NUMBERS = ("none", "one", "two", "three", "four")


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def pick_except(rng: np.random.Generator, options: Sequence[str], excluded: set[str]) -> str:
    return pick(rng, [option for option in options if option not in excluded])


def pick_several(rng: np.random.Generator, options: Sequence[str], count: int) -> list[str]:
    """`count` different options in random order, or all if there are fewer."""
    return [options[int(i)] for i in rng.permutation(len(options))[:count]]


def with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plain(pair: Pair, rng: np.random.Generator) -> Pair:
    """The question unchanged or, half the time, starting in lower case."""
    question, answer = pair
    return (question[0].lower() + question[1:] if rng.random() < 0.5 else question), answer


def lettered(
    pair: Pair, distractors: Sequence[str], rng: np.random.Generator, *, seen: Sequence[str] = (), text: str | None = None
) -> Pair:
    """The question as multiple choice with 2 to 9 options and an answer such as "(B) red", worded like the package's prompts.

    `seen` lists the modalities that the prompt may mention ("image", "text"); if it is empty, it mentions none. `text` is put
    before the question as the text modality.
    """
    question, answer = pair
    wrong = [d for d in dict.fromkeys(distractors) if d != answer]
    wrong = pick_several(rng, wrong, int(rng.integers(1, min(len(LETTERS) - 1, len(wrong)) + 1)))
    options = pick_several(rng, [answer, *wrong], len(LETTERS))
    opening = int(rng.integers(3))
    if opening == 0 and seen:
        question = f"Based on {' and '.join(f'the {modality}' for modality in sorted(seen))}, {question}"
    elif opening == 1:
        question = f"Without considering the modality, {question}"
    lines = [] if text is None else [f"Text: {text}"]
    lines += [question, *[f"({LETTERS[i]}) {option}" for i, option in enumerate(options)], LETTER_RULE]
    return "\n".join(lines), f"({LETTERS[options.index(answer)]}) {answer}"
