"""How questions are worded: small helpers, and the lettered form that the project's prompts give to closed questions."""

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


def other(rng: np.random.Generator, options: Sequence[str], not_these: set[str]) -> str:
    return pick(rng, [option for option in options if option not in not_these])


def some(rng: np.random.Generator, options: Sequence[str], count: int) -> list[str]:
    """`count` different ones in random order, or all where there are fewer."""
    return [options[int(i)] for i in rng.permutation(len(options))[:count]]


def article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plain(pair: Pair, rng: np.random.Generator) -> Pair:
    """The question as it is, or beginning in lower case."""
    question, answer = pair
    return (question[0].lower() + question[1:] if rng.random() < 0.5 else question), answer


def lettered(
    pair: Pair, distractors: Sequence[str], rng: np.random.Generator, *, seen: Sequence[str] = (), text: str | None = None
) -> Pair:
    """The question as multiple choice of 2 to 9 options, answered as "(B) red", in the words of the prompt strategies.

    `seen` names the modalities that are there ("image", "text"); with none of them the question stands alone. `text`
    goes before it as the text modality.
    """
    question, answer = pair
    wrong = [d for d in dict.fromkeys(distractors) if d != answer]
    wrong = some(rng, wrong, int(rng.integers(1, min(len(LETTERS) - 1, len(wrong)) + 1)))
    options = some(rng, [answer, *wrong], len(LETTERS))
    start = int(rng.integers(3))
    if start == 0 and seen:
        question = f"Based on {' and '.join(f'the {modality}' for modality in sorted(seen))}, {question}"
    elif start == 1:
        question = f"Without considering the modality, {question}"
    lines = [] if text is None else [f"Text: {text}"]
    lines += [question, *[f"({LETTERS[i]}) {option}" for i, option in enumerate(options)], LETTER_RULE]
    return "\n".join(lines), f"({LETTERS[options.index(answer)]}) {answer}"
