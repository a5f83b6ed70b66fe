"""Questions that a text alone answers: facts to look up, what kind of thing a noun names, and the lettered form itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recipes.pocket.scenes import COLORS, NAMES, SHAPES
from recipes.pocket.wording import LETTERS, NUMBERS, Pair, article, lettered, other, pick, plain, some
from recipes.pocket.words import BEFORE, KINDS, READABLE

PEOPLE = ("Ann", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo")
LINKS = ("next to", "far from", "beside", "near", "under", "over", "left of", "right of", "behind", "in")


class Facts:
    """Up to four coloured things, no colour and no shape twice, put into words in one of several ways."""

    def __init__(self, rng: np.random.Generator) -> None:
        number = int(rng.integers(1, 5))
        self.shapes = some(rng, SHAPES if rng.random() < 0.5 else NAMES, number)
        self.colors = some(rng, list(COLORS), number)
        self.names = [f"{c} {s}" for c, s in zip(self.colors, self.shapes, strict=True)]
        self.owners: list[str] = []
        self.links: list[str] = []
        style = int(rng.integers(5))
        if style == 0:
            self.text = "There is " + " and ".join(map(article, self.names)) + "."
        elif style == 1:
            self.text = " ".join(f"The {s} is {c}." for c, s in zip(self.colors, self.shapes, strict=True))
        elif style == 2:
            self.text = "One sees " + ", ".join(map(article, self.names)) + "."
        elif style == 3:
            self.owners = some(rng, PEOPLE, number)
            self.text = " ".join(f"{p} has {article(n)}." for p, n in zip(self.owners, self.names, strict=True))
        else:
            self.links = [pick(rng, LINKS) for _ in range(number - 1)]
            said = f"{article(self.names[0])} is here".capitalize() if number == 1 else ""
            for i, link in enumerate(self.links):
                said += (
                    f"{' and ' if i else ''}{article(self.names[i]) if i else article(self.names[0]).capitalize()} is {link} "
                )
                said += article(self.names[i + 1])
            self.text = said + "."

    def ask(self, rng: np.random.Generator) -> tuple[Pair, Sequence[str]]:
        """One question with its answer, and the wrong options it may be given."""
        i = int(rng.integers(len(self.names)))
        kind = int(rng.integers(6 if self.owners or self.links[:1] else 5))
        if kind == 0:
            ask = pick(rng, ("Name the color of the {}.", "Which color has the {}?", "The {} is of which color?"))
            return (ask.format(self.shapes[i]), self.colors[i]), list(COLORS)
        if kind == 1:
            ask = pick(rng, ("Name the shape of the {} object.", "Which thing is {}?", "Name the {} thing."))
            return (ask.format(self.colors[i]), self.shapes[i]), SHAPES if self.shapes[i] in SHAPES else NAMES
        if kind in (2, 3):
            exists = rng.random() < 0.5
            said = self._statement(i, exists, rng)
            asks = ("Does the text name {a}?", "Is {a} mentioned?", "Is {a} named here?")
            negated = (
                "Is it true that {a} is not named?",
                "Is {a} left out?",
                "Does the text not name {a}?",
                "Is no {n} mentioned?",
            )
            negates = rng.random() < 0.5
            ask = pick(rng, negated if negates else asks).format(a=article(said), n=said)
            return (ask, "yes" if exists != negates else "no"), ("yes", "no")
        if kind == 4:
            return ("How many objects are named?", NUMBERS[len(self.names)]), NUMBERS
        if self.owners:
            if rng.random() < 0.5:
                return (f"Who has the {self.shapes[i]}?", self.owners[i]), PEOPLE
            return (f"What has {self.owners[i]} got?", self.names[i]), self.names + [f"{c} {self.shapes[i]}" for c in COLORS]
        i = int(rng.integers(len(self.links)))
        return (f"What is the {self.shapes[i]} {self.links[i]}?", self.names[i + 1]), [
            f"{c} {pick(rng, NAMES)}" for c in COLORS
        ]

    def _statement(self, i: int, true: bool, rng: np.random.Generator) -> str:
        kind, what = int(rng.integers(3)), pick(rng, ("object", "thing", "shape"))
        if kind == 0:
            return self.shapes[i] if true else other(rng, SHAPES if self.shapes[i] in SHAPES else NAMES, set(self.shapes))
        if kind == 1:
            return f"{self.colors[i] if true else other(rng, list(COLORS), set(self.colors))} {what}"
        near = [f"{self.colors[i]} {s}" for s in self.shapes] + [f"{c} {self.shapes[i]}" for c in COLORS]
        return self.names[i] if true else other(rng, near, set(self.names))


NOUNS = tuple((noun, kind) for kind, nouns in KINDS.items() for noun in nouns)
TWICE = {noun for noun, kind in NOUNS if any(noun == n and kind != k for n, k in NOUNS)}


def ask_noun(rng: np.random.Generator) -> Pair:
    """What kind of thing a noun names: as multiple choice of kinds or of nouns, openly, or as yes or no."""
    noun, kind = NOUNS[int(rng.integers(len(NOUNS)))]
    said, wrong = f"{pick(rng, BEFORE)} {noun}", [k for k in KINDS if noun not in KINDS[k]]
    form = int(rng.integers(6))
    if form < 3:
        ask = pick(rng, ("which kind of thing is named?", "to which kind does this belong?", "which option is right?"))
        return lettered((ask, kind), wrong, rng, seen=("text",), text=said)
    if form == 3 and noun not in TWICE:
        return f"Which kind of thing is {said}?", kind
    if form == 4:
        others = [f"{pick(rng, BEFORE)} {pick(rng, KINDS[k])}" for k in some(rng, wrong, 8)]
        others = [o for o in others if o.split(" ", 1)[1] not in KINDS[kind]]
        return lettered((f"which option belongs to {kind}?", said), others, rng)
    true = rng.random() < 0.5
    return plain((f"Does {said} belong to {kind if true else pick(rng, wrong)}?", "yes" if true else "no"), rng)


def ask_same(rng: np.random.Generator) -> Pair:
    """The lettered form with nothing to know: which option repeats the text; or how a word is spelled."""
    if rng.random() < 0.3:
        word = pick(rng, READABLE)
        return f"Spell {word}.", " ".join(word)
    every = [f"{c} {pick(rng, NAMES)}" for c in COLORS] if rng.random() < 0.5 else some(rng, READABLE, 9)
    ask = pick(rng, ("which option says the same?", "which option repeats the text?", "which option is right?"))
    said = pick(rng, every)
    if rng.random() < 0.3:
        return lettered((f"which option is {said}?", said), every, rng)
    return lettered((ask, said), every, rng, seen=("text",), text=said)


EVERY_WORD = tuple(sorted({noun for noun, _ in NOUNS} | set(READABLE)))


def lettered_words(rng: np.random.Generator, hardest: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """2 to `hardest` words with letters, and the same twice over, each time in an order of its own."""
    words = some(rng, EVERY_WORD, int(rng.integers(2, hardest + 1)))
    options = list(zip(LETTERS, words, strict=False))
    return options, [options[int(i)] for _ in range(2) for i in rng.permutation(len(options))]


def ask_texts(rng: np.random.Generator, how_many: int) -> tuple[str, list[Pair]]:
    """A text that all questions share, "" where each brings its own, and the questions with their answers."""
    what = rng.random()
    if what >= 0.6:
        return "", [ask_noun(rng) if what >= 0.75 else ask_same(rng) for _ in range(how_many)]
    facts, as_options, pairs = Facts(rng), rng.random() < 0.3, []
    for _ in range(how_many):
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
"""Words of the benchmark's prompts, so that the tokenizer does not break them into bytes."""
