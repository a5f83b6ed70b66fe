"""What is asked about a generated scene: (question, answer) pairs as plain strings.

The wording is deliberately not that of any benchmark task, so that a benchmark measures transfer; both answers of a
yes/no question are drawn equally often, so that neither is worth guessing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from recipes.pocket.objects import OBJECTS
from recipes.pocket.scenes import COLORS, NAMES, SHAPES, Scene, Thing
from recipes.pocket.wording import NUMBERS, Pair, article, lettered, other, pick, plain
from recipes.pocket.words import KINDS, READABLE

YES_NO = ("yes", "no")
KIND_OF = {
    name: next(kind for kind, nouns in KINDS.items() if name in nouns)
    for name in (
        "house tree car boat fish bird cat bear hand flower leaf apple cherry cup bottle cake key book clock lamp hat shirt "
        "rocket train ladder arrow moon sun cloud"
    ).split()
}
"""Drawn object → the kind of thing it is, where the nouns know it."""


def _phrase(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _unique(things: Sequence[Thing], key: Callable[[Thing], str]) -> list[Thing]:
    counts = Counter(key(thing) for thing in things)
    return [thing for thing in things if counts[key(thing)] == 1]


def _any(things: Sequence[Thing], rng: np.random.Generator) -> Thing | None:
    return things[int(rng.integers(len(things)))] if things else None


def caption(scene: Scene, rng: np.random.Generator) -> Pair:
    """Every thing in reading order, then the word: the densest supervision a picture gives."""
    ordered = sorted(scene.things, key=lambda t: (t.y, t.x))
    said = [f"{article(_phrase(thing))} at the {thing.place}" for thing in ordered]
    said += [f"the word {scene.word}"] if scene.word else []
    ask = pick(rng, ("Describe the picture.", "Say all that the picture shows.", "Write a caption."))
    return ask, "; ".join(said) + "."


def color_of(scene: Scene, rng: np.random.Generator) -> Pair | None:
    if len(scene.things) == 1 and rng.random() < 0.5:
        alone = (
            "Name the color of the {}.",
            "Which color was used?",
            "The {} has which color?",
            "Name the color of the shape.",
        )
        return pick(rng, alone).format("object"), scene.things[0].color
    if (thing := _any(_unique(scene.things, lambda t: t.shape), rng)) is None:
        return None
    ask = ("Name the color of the {}.", "Which color has the {}?", "The {} is painted in which color?")
    return pick(rng, ask).format(thing.shape), thing.color


def shape_of(scene: Scene, rng: np.random.Generator) -> Pair | None:
    if len(scene.things) == 1 and rng.random() < 0.5:
        asks: tuple[str, ...] = ("Name the thing.", "Which thing was drawn?", "What does one see?")
        if scene.things[0].shape in SHAPES:
            asks = ("Name the shape of the object.", "Which shape was drawn?", "The object has which form?")
        return pick(rng, asks), scene.things[0].shape
    if (thing := _any(_unique(scene.things, lambda t: t.color), rng)) is None:
        return None
    ask: tuple[str, ...] = ("Name the {} thing.", "Which thing is {}?")
    if thing.shape in SHAPES:
        ask = ("Name the shape of the {} object.", "Which shape is {}?", "The {} object has which form?")
    return pick(rng, ask).format(thing.color), thing.shape


def _near(thing: Thing) -> list[str]:
    """Right colour with a wrong shape, or the reverse."""
    shapes = SHAPES if thing.shape in SHAPES else tuple(OBJECTS)
    return [f"{thing.color} {s}" for s in shapes] + [f"{c} {thing.shape}" for c in COLORS]


def _statement(scene: Scene, rng: np.random.Generator, true: bool) -> str | None:
    """What may be there: a shape, a colour or both; None where there is nothing to speak of."""
    if not scene.things:
        return None
    kind, what = int(rng.integers(3)), pick(rng, ("object", "thing", "shape"))
    there: set[str] = {(t.shape, f"{t.color} {what}", _phrase(t))[kind] for t in scene.things}
    if true:
        return pick(rng, sorted(there))
    thing = scene.things[int(rng.integers(len(scene.things)))]
    alike = SHAPES if thing.shape in SHAPES else NAMES
    if kind == 2:
        every = _near(thing) if rng.random() < 0.7 else [f"{c} {s}" for c in COLORS for s in alike]
    else:
        every = [f"{c} {what}" for c in COLORS] if kind == 1 else list(alike)
    return other(rng, every, there)


def presence(scene: Scene, rng: np.random.Generator) -> Pair | None:
    """Is there such a thing, asked plainly or negated."""
    exists = rng.random() < 0.5
    if (said := _statement(scene, rng, exists)) is None:
        return None
    asks = ("Can you see {a}?", "Does one find {a} here?", "Has the picture got {a}?", "Is {a} drawn here?")
    negated = (
        "Is the picture without {a}?",
        "Is it true that {a} is missing?",
        "Is the picture free of any {n}?",
        "Is no {n} drawn?",
    )
    if rng.random() < 0.5:
        return pick(rng, asks).format(a=article(said), n=said), "yes" if exists else "no"
    return pick(rng, negated).format(a=article(said), n=said), "no" if exists else "yes"


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
    known = _unique(scene.things, _phrase)
    if len(known) < 2:
        return None
    first, second = (known[int(i)] for i in rng.permutation(len(known))[:2])
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
    said = scene.word if true else other(rng, READABLE, {scene.word})
    return pick(rng, ("Is the word {} written?", "Does the picture say {}?")).format(said), "yes" if true else "no"


def kind_of(scene: Scene, rng: np.random.Generator) -> Pair | None:
    """What kind of thing an object is, always as multiple choice."""
    thing = _any([t for t in scene.things if t.shape in KIND_OF], rng)
    if thing is None or len(scene.things) > 1:
        return None
    kind = KIND_OF[thing.shape]
    wrong = [k for k, nouns in KINDS.items() if thing.shape not in nouns]
    ask = pick(rng, ("which kind of thing is drawn?", "which option is right?", "to which kind does the object belong?"))
    return lettered((ask, kind), wrong, rng, seen=("image",))


def agreement(scene: Scene, rng: np.random.Generator) -> Pair | None:
    """Whether a text is true of the picture: neither tells without the other."""
    true = rng.random() < 0.5
    if scene.word is not None and (not scene.things or rng.random() < 0.4):
        word = scene.word if true else other(rng, READABLE, {scene.word})
        text = pick(rng, ("the word {}", "{}", "it says {}")).format(word)
    elif (said := _statement(scene, rng, true)) is not None:
        text = pick(rng, (said, article(said), f"there is {article(said)}", f"one sees {article(said)}"))
    else:
        return None
    ask = pick(rng, ("do the two agree?", "is the text true of the picture?", "does the text fit the picture?"))
    if rng.random() < 0.4:
        return f"{text}\n{ask}", "yes" if true else "no"
    answers = (("yes", "no"), ("true", "false"), ("agrees", "differs"))[int(rng.integers(3))]
    return lettered((ask, answers[0 if true else 1]), answers, rng, seen=("image", "text"), text=text)


Ask = Callable[[Scene, np.random.Generator], Pair | None]
EVENLY: tuple[Ask, ...] = (
    *[color_of, shape_of] * 2, *[presence] * 4, counting, *[place_of, relation] * 2, kind_of, *[agreement] * 2
)  # fmt: skip
MOSTLY_PRESENCE: tuple[Ask, ...] = (color_of, shape_of, *[presence] * 6, place_of, relation, kind_of)
"""Without `agreement`, the rule of the task pocket-memes: with it here the model reached that task's ceiling untrained,
and there was nothing left to measure (docs/log.md). The stage before has a few, which teach it little."""
OF_WORDS: tuple[Ask, ...] = (reading, reading, spelling, written, agreement)
ANSWERS: dict[str, Sequence[str]] = {"color_of": list(COLORS), "shape_of": NAMES, "reading": READABLE, "counting": NUMBERS}
"""The wrong options of lettered questions, by who asks; yes and no for the others."""
WHOLE = ("caption", "kind_of", "agreement", "place_of", "spelling")
"""Asked in one form alone."""


def ask_scene(scene: Scene, rng: np.random.Generator, how_many: int, asks: Sequence[Ask] = EVENLY) -> list[Pair]:
    """A caption and `how_many` questions about one picture; about a third of them lettered."""
    pairs = [caption(scene, rng)]
    of_words = [ask for ask in OF_WORDS if ask is not agreement or agreement in asks]
    while len(pairs) <= how_many:
        about_word = scene.word is not None and (not scene.things or rng.random() < 0.5)
        among = of_words if about_word else asks
        ask = among[int(rng.integers(len(among)))]
        if (pair := ask(scene, rng)) is None:
            continue
        if ask.__name__ not in WHOLE:
            distractors = ANSWERS.get(ask.__name__, YES_NO)
            pair = lettered(pair, distractors, rng, seen=("image",)) if rng.random() < 0.3 else plain(pair, rng)
        pairs.append(pair)
    return pairs
