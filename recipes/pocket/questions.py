"""Questions about a generated scene: (question, answer) pairs as plain strings.

The wording deliberately differs from that of every benchmark task, so that a benchmark measures transfer. Both answers of
a yes/no question are equally likely, so that guessing one of them gains nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from recipes.pocket.objects import OBJECTS
from recipes.pocket.scenes import COLORS, NAMES, SHAPES, Scene, Thing
from recipes.pocket.wording import NUMBERS, Pair, lettered, pick, pick_except, plain, with_article
from recipes.pocket.words import KINDS, READABLE

YES_NO = ("yes", "no")
KIND_OF = {
    name: next(kind for kind, nouns in KINDS.items() if name in nouns)
    for name in (
        "house tree car boat fish bird cat bear hand flower leaf apple cherry cup bottle cake key book clock lamp hat shirt "
        "rocket train ladder arrow moon sun cloud"
    ).split()
}
"""Drawn object → its kind, for the objects whose names are among the nouns of `KINDS`."""


def _phrase(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _unique(things: Sequence[Thing], key: Callable[[Thing], str]) -> list[Thing]:
    """The things that share their `key` with no other thing."""
    counts = Counter(key(thing) for thing in things)
    return [thing for thing in things if counts[key(thing)] == 1]


def _any(things: Sequence[Thing], rng: np.random.Generator) -> Thing | None:
    return things[int(rng.integers(len(things)))] if things else None


def caption(scene: Scene, rng: np.random.Generator) -> Pair:
    """All things in reading order, then the word: the densest supervision that a picture gives."""
    ordered = sorted(scene.things, key=lambda t: (t.y, t.x))
    phrases = [f"{with_article(_phrase(thing))} at the {thing.place}" for thing in ordered]
    phrases += [f"the word {scene.word}"] if scene.word else []
    question = pick(rng, ("Describe the picture.", "Say all that the picture shows.", "Write a caption."))
    return question, "; ".join(phrases) + "."


def color_of(scene: Scene, rng: np.random.Generator) -> Pair | None:
    if len(scene.things) == 1 and rng.random() < 0.5:
        templates = (
            "Name the color of the {}.",
            "Which color was used?",
            "The {} has which color?",
            "Name the color of the shape.",
        )
        return pick(rng, templates).format("object"), scene.things[0].color
    if (thing := _any(_unique(scene.things, lambda t: t.shape), rng)) is None:
        return None
    template = pick(rng, ("Name the color of the {}.", "Which color has the {}?", "The {} is painted in which color?"))
    return template.format(thing.shape), thing.color


def shape_of(scene: Scene, rng: np.random.Generator) -> Pair | None:
    if len(scene.things) == 1 and rng.random() < 0.5:
        questions: tuple[str, ...] = ("Name the thing.", "Which thing was drawn?", "What does one see?")
        if scene.things[0].shape in SHAPES:
            questions = ("Name the shape of the object.", "Which shape was drawn?", "The object has which form?")
        return pick(rng, questions), scene.things[0].shape
    if (thing := _any(_unique(scene.things, lambda t: t.color), rng)) is None:
        return None
    templates: tuple[str, ...] = ("Name the {} thing.", "Which thing is {}?")
    if thing.shape in SHAPES:
        templates = ("Name the shape of the {} object.", "Which shape is {}?", "The {} object has which form?")
    return pick(rng, templates).format(thing.color), thing.shape


def _similar(thing: Thing) -> list[str]:
    """The right colour with any shape, and any colour with the right shape."""
    shapes = SHAPES if thing.shape in SHAPES else tuple(OBJECTS)
    return [f"{thing.color} {s}" for s in shapes] + [f"{c} {thing.shape}" for c in COLORS]


def _description(scene: Scene, rng: np.random.Generator, true: bool) -> str | None:
    """A shape, a colour or both, present in the scene if `true` and absent otherwise. None if the scene has no things."""
    if not scene.things:
        return None
    kind, noun = int(rng.integers(3)), pick(rng, ("object", "thing", "shape"))
    present: set[str] = {(t.shape, f"{t.color} {noun}", _phrase(t))[kind] for t in scene.things}
    if true:
        return pick(rng, sorted(present))
    thing = scene.things[int(rng.integers(len(scene.things)))]
    shapes = SHAPES if thing.shape in SHAPES else NAMES
    if kind == 2:
        candidates = _similar(thing) if rng.random() < 0.7 else [f"{c} {s}" for c in COLORS for s in shapes]
    else:
        candidates = [f"{c} {noun}" for c in COLORS] if kind == 1 else list(shapes)
    return pick_except(rng, candidates, present)


def presence(scene: Scene, rng: np.random.Generator) -> Pair | None:
    """Whether the picture shows such a thing, asked directly or negated."""
    exists = rng.random() < 0.5
    if (description := _description(scene, rng, exists)) is None:
        return None
    direct = ("Can you see {a}?", "Does one find {a} here?", "Has the picture got {a}?", "Is {a} drawn here?")
    negated = (
        "Is the picture without {a}?",
        "Is it true that {a} is missing?",
        "Is the picture free of any {n}?",
        "Is no {n} drawn?",
    )
    negates = rng.random() >= 0.5
    question = pick(rng, negated if negates else direct).format(a=with_article(description), n=description)
    return question, "yes" if exists != negates else "no"


def counting(scene: Scene, rng: np.random.Generator) -> Pair:
    if rng.random() < 0.4 or not scene.things:
        return "How many objects are drawn?", NUMBERS[len(scene.things)]
    shape = pick(rng, [t.shape for t in scene.things] + [pick(rng, NAMES)])
    return f"Count each {shape}.", NUMBERS[sum(t.shape == shape for t in scene.things)]


def place_of(scene: Scene, rng: np.random.Generator) -> Pair | None:
    if (thing := _any(_unique(scene.things, _phrase), rng)) is None:
        return None
    return pick(rng, ("Where is the {}?", "Find the {}.")).format(_phrase(thing)), thing.place


def relation(scene: Scene, rng: np.random.Generator) -> Pair | None:
    things = _unique(scene.things, _phrase)
    if len(things) < 2:
        return None
    first, second = (things[int(i)] for i in rng.permutation(len(things))[:2])
    if abs(first.x - second.x) > abs(first.y - second.y):
        word, holds = ("left of", first.x < second.x) if rng.random() < 0.5 else ("right of", first.x > second.x)
    else:
        word, holds = ("above", first.y < second.y) if rng.random() < 0.5 else ("below", first.y > second.y)
    return f"Is the {_phrase(first)} {word} the {_phrase(second)}?", "yes" if holds else "no"


def reading(scene: Scene, rng: np.random.Generator) -> Pair | None:
    if scene.word is None:
        return None
    return pick(rng, ("Read the word.", "Which word is written?", "What is written in the picture?")), scene.word


def spelling(scene: Scene, rng: np.random.Generator) -> Pair | None:
    return ("Spell what is written.", " ".join(scene.word)) if scene.word else None


def written(scene: Scene, rng: np.random.Generator) -> Pair | None:
    if scene.word is None:
        return None
    true = rng.random() < 0.5
    word = scene.word if true else pick_except(rng, READABLE, {scene.word})
    return pick(rng, ("Is the word {} written?", "Does the picture say {}?")).format(word), "yes" if true else "no"


def kind_of(scene: Scene, rng: np.random.Generator) -> Pair | None:
    """What kind of thing an object is; always as multiple choice."""
    thing = _any([t for t in scene.things if t.shape in KIND_OF], rng)
    if thing is None or len(scene.things) > 1:
        return None
    wrong = [k for k, nouns in KINDS.items() if thing.shape not in nouns]
    question = pick(rng, ("which kind of thing is drawn?", "which option is right?", "to which kind does the object belong?"))
    return lettered((question, KIND_OF[thing.shape]), wrong, rng, seen=("image",))


def agreement(scene: Scene, rng: np.random.Generator) -> Pair | None:
    """Whether a text is true of the picture. Neither of them alone gives the answer."""
    true = rng.random() < 0.5
    if scene.word is not None and (not scene.things or rng.random() < 0.4):
        word = scene.word if true else pick_except(rng, READABLE, {scene.word})
        text = pick(rng, ("the word {}", "{}", "it says {}")).format(word)
    elif (description := _description(scene, rng, true)) is not None:
        noun_phrase = with_article(description)
        text = pick(rng, (description, noun_phrase, f"there is {noun_phrase}", f"one sees {noun_phrase}"))
    else:
        return None
    question = pick(rng, ("do the two agree?", "is the text true of the picture?", "does the text fit the picture?"))
    if rng.random() < 0.4:
        return f"{text}\n{question}", "yes" if true else "no"
    answers = (("yes", "no"), ("true", "false"), ("agrees", "differs"))[int(rng.integers(3))]
    return lettered((question, answers[0 if true else 1]), answers, rng, seen=("image", "text"), text=text)


Asker = Callable[[Scene, np.random.Generator], Pair | None]
"""A function that asks one kind of question; None if the scene does not allow it."""
BALANCED: tuple[Asker, ...] = (
    *[color_of, shape_of] * 2, *[presence] * 4, counting, *[place_of, relation] * 2, kind_of, *[agreement] * 2
)  # fmt: skip
MOSTLY_PRESENCE: tuple[Asker, ...] = (color_of, shape_of, *[presence] * 6, place_of, relation, kind_of)
"""Without `agreement`, which is the rule of the task pocket-memes: with it in the last stage, the model reached that task's
ceiling before any fine-tuning, so nothing was left to measure (docs/log.md). The stage before has a few such questions, which
teach the model little."""
ABOUT_WORDS: tuple[Asker, ...] = (reading, reading, spelling, written, agreement)
DISTRACTORS: dict[str, Sequence[str]] = {"color_of": list(COLORS), "shape_of": NAMES, "reading": READABLE, "counting": NUMBERS}
"""Name of the asker → the wrong options of its lettered questions; yes and no for all others."""
SINGLE_FORM = ("kind_of", "agreement", "place_of", "spelling")
"""Names of the askers that choose the form of their questions themselves."""


def ask_scene(scene: Scene, rng: np.random.Generator, count: int, askers: Sequence[Asker] = BALANCED) -> list[Pair]:
    """A caption and `count` questions about one picture; about a third of them are lettered."""
    pairs = [caption(scene, rng)]
    about_words = [asker for asker in ABOUT_WORDS if asker is not agreement or agreement in askers]
    while len(pairs) <= count:
        about_word = scene.word is not None and (not scene.things or rng.random() < 0.5)
        candidates = about_words if about_word else askers
        asker = candidates[int(rng.integers(len(candidates)))]
        if (pair := asker(scene, rng)) is None:
            continue
        if asker.__name__ not in SINGLE_FORM:
            distractors = DISTRACTORS.get(asker.__name__, YES_NO)
            pair = lettered(pair, distractors, rng, seen=("image",)) if rng.random() < 0.3 else plain(pair, rng)
        pairs.append(pair)
    return pairs
