"""Questions without pictures: facts to look up in a text, the kinds of nouns, and options that repeat a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recipes.pocket.scenes import COLORS, NAMES, SHAPES
from recipes.pocket.wording import LETTERS, NUMBERS, Pair, lettered, pick, pick_except, pick_several, plain, with_article
from recipes.pocket.words import DETERMINERS, KINDS, READABLE

PEOPLE = ("Ann", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo")
LINKS = ("next to", "far from", "beside", "near", "under", "over", "left of", "right of", "behind", "in")


class Facts:
    """Up to four coloured things, with no colour or shape used twice, described in one of several ways."""

    def __init__(self, rng: np.random.Generator) -> None:
        count = int(rng.integers(1, 5))
        self.shapes = pick_several(rng, SHAPES if rng.random() < 0.5 else NAMES, count)
        self.colors = pick_several(rng, list(COLORS), count)
        self.names = [f"{c} {s}" for c, s in zip(self.colors, self.shapes, strict=True)]
        self.owners: list[str] = []
        self.links: list[str] = []
        style = int(rng.integers(5))
        if style == 0:
            self.text = "There is " + " and ".join(map(with_article, self.names)) + "."
        elif style == 1:
            self.text = " ".join(f"The {s} is {c}." for c, s in zip(self.colors, self.shapes, strict=True))
        elif style == 2:
            self.text = "One sees " + ", ".join(map(with_article, self.names)) + "."
        elif style == 3:
            self.owners = pick_several(rng, PEOPLE, count)
            self.text = " ".join(f"{p} has {with_article(n)}." for p, n in zip(self.owners, self.names, strict=True))
        else:
            self.links = [pick(rng, LINKS) for _ in range(count - 1)]
            self.text = self._linked_text()

    def _linked_text(self) -> str:
        """For example "A red star is under a blue cup and a blue cup is near a pink bell."."""
        names = [with_article(name) for name in self.names]
        if not self.links:
            return f"{names[0]} is here".capitalize() + "."
        names_before = [names[0].capitalize(), *names[1:]]
        clauses = zip(names_before, self.links, names[1:], strict=False)
        return " and ".join(f"{before} is {link} {after}" for before, link, after in clauses) + "."

    def ask(self, rng: np.random.Generator) -> tuple[Pair, Sequence[str]]:
        """A question with its answer, and options for a lettered form of it; the answer may be among them."""
        i = int(rng.integers(len(self.names)))
        kind = int(rng.integers(6 if self.owners or self.links else 5))
        if kind == 0:
            template = pick(rng, ("Name the color of the {}.", "Which color has the {}?", "The {} is of which color?"))
            return (template.format(self.shapes[i]), self.colors[i]), list(COLORS)
        if kind == 1:
            template = pick(rng, ("Name the shape of the {} object.", "Which thing is {}?", "Name the {} thing."))
            return (template.format(self.colors[i]), self.shapes[i]), self._similar(i)
        if kind in (2, 3):
            return self._ask_presence(i, rng), ("yes", "no")
        if kind == 4:
            return ("How many objects are named?", NUMBERS[len(self.names)]), NUMBERS
        if self.owners:
            if rng.random() < 0.5:
                return (f"Who has the {self.shapes[i]}?", self.owners[i]), PEOPLE
            return (f"What has {self.owners[i]} got?", self.names[i]), self.names + [f"{c} {self.shapes[i]}" for c in COLORS]
        i = int(rng.integers(len(self.links)))
        distractors = [f"{c} {pick(rng, NAMES)}" for c in COLORS]
        return (f"What is the {self.shapes[i]} {self.links[i]}?", self.names[i + 1]), distractors

    def _ask_presence(self, i: int, rng: np.random.Generator) -> Pair:
        """Whether the text names such a thing, asked directly or negated."""
        exists = rng.random() < 0.5
        description = self._description(i, exists, rng)
        direct = ("Does the text name {a}?", "Is {a} mentioned?", "Is {a} named here?")
        negated = (
            "Is it true that {a} is not named?",
            "Is {a} left out?",
            "Does the text not name {a}?",
            "Is no {n} mentioned?",
        )
        negates = rng.random() < 0.5
        question = pick(rng, negated if negates else direct).format(a=with_article(description), n=description)
        return question, "yes" if exists != negates else "no"

    def _description(self, i: int, true: bool, rng: np.random.Generator) -> str:
        """A shape, a colour, or both: of thing `i` if `true`, else of none of the things."""
        kind, noun = int(rng.integers(3)), pick(rng, ("object", "thing", "shape"))
        if kind == 0:
            return self.shapes[i] if true else pick_except(rng, self._similar(i), set(self.shapes))
        if kind == 1:
            return f"{self.colors[i] if true else pick_except(rng, list(COLORS), set(self.colors))} {noun}"
        similar = [f"{self.colors[i]} {s}" for s in self.shapes] + [f"{c} {self.shapes[i]}" for c in COLORS]
        return self.names[i] if true else pick_except(rng, similar, set(self.names))

    def _similar(self, i: int) -> tuple[str, ...]:
        """The plain shapes if thing `i` is one of them, else the names of everything that can be drawn."""
        return SHAPES if self.shapes[i] in SHAPES else NAMES


NOUNS = tuple((noun, kind) for kind, nouns in KINDS.items() for noun in nouns)
AMBIGUOUS = {noun for noun, kind in NOUNS if any(noun == n and kind != k for n, k in NOUNS)}
"""Nouns of more than one kind."""


def ask_noun(rng: np.random.Generator) -> Pair:
    """Ask what kind of thing a noun names: with kinds or nouns as options, as an open question, or as a yes/no question."""
    noun, kind = NOUNS[int(rng.integers(len(NOUNS)))]
    phrase, wrong = f"{pick(rng, DETERMINERS)} {noun}", [k for k in KINDS if noun not in KINDS[k]]
    form = int(rng.integers(6))
    if form < 3:
        question = pick(rng, ("which kind of thing is named?", "to which kind does this belong?", "which option is right?"))
        return lettered((question, kind), wrong, rng, seen=("text",), text=phrase)
    if form == 3 and noun not in AMBIGUOUS:
        return f"Which kind of thing is {phrase}?", kind
    if form == 4:
        others = [f"{pick(rng, DETERMINERS)} {pick(rng, KINDS[k])}" for k in pick_several(rng, wrong, 8)]
        others = [o for o in others if o.split(" ", 1)[1] not in KINDS[kind]]
        return lettered((f"which option belongs to {kind}?", phrase), others, rng)
    true = rng.random() < 0.5
    return plain((f"Does {phrase} belong to {kind if true else pick(rng, wrong)}?", "yes" if true else "no"), rng)


def ask_repetition(rng: np.random.Generator) -> Pair:
    """Ask for something that the prompt contains: the option that repeats the text, or the letters of a word."""
    if rng.random() < 0.3:
        word = pick(rng, READABLE)
        return f"Spell {word}.", " ".join(word)
    options = [f"{c} {pick(rng, NAMES)}" for c in COLORS] if rng.random() < 0.5 else pick_several(rng, READABLE, 9)
    question = pick(rng, ("which option says the same?", "which option repeats the text?", "which option is right?"))
    answer = pick(rng, options)
    if rng.random() < 0.3:
        return lettered((f"which option is {answer}?", answer), options, rng)
    return lettered((question, answer), options, rng, seen=("text",), text=answer)


ALL_WORDS = tuple(sorted({noun for noun, _ in NOUNS} | set(READABLE)))


def lettered_words(rng: np.random.Generator, most: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """2 to `most` words with letters, and the same pairs twice more, each time in a new random order."""
    words = pick_several(rng, ALL_WORDS, int(rng.integers(2, most + 1)))
    options = list(zip(LETTERS, words, strict=False))
    return options, [options[int(i)] for _ in range(2) for i in rng.permutation(len(options))]


def ask_texts(rng: np.random.Generator, count: int) -> tuple[str, list[Pair]]:
    """`count` questions with answers, and the text that they share ("" if each question stands alone)."""
    draw = rng.random()
    if draw >= 0.6:
        return "", [ask_noun(rng) if draw >= 0.75 else ask_repetition(rng) for _ in range(count)]
    facts, as_options, pairs = Facts(rng), rng.random() < 0.3, []
    for _ in range(count):
        pair, distractors = facts.ask(rng)
        pairs.append(lettered(pair, distractors, rng, seen=("text",)) if as_options else plain(pair, rng))
    return f"Text: {facts.text}" if as_options else facts.text, pairs


PROMPT_WORDS = (
    "Based on the image and the text, which option is right? Based on the image, based on the text, without considering "
    "the modality. Text: Question: Options: Answer: true false hateful not hateful picture post tweet disaster class "
    "what is the are there in of to and or a an this that does contain shape color object present image question "
    "smileys emotion people body animals nature food drink travel places activities objects symbols flags emoji group face "
    "with flag"
)
"""Words of the benchmark's prompts, so that the tokenizer does not split them into bytes."""
