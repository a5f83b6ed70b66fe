"""What is asked about a generated scene, and the text-only questions: (question, answer) pairs as plain strings.

The wording is deliberately not that of any benchmark task, so that a benchmark measures transfer; both answers of a
yes/no question are drawn equally often, so that neither is worth guessing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from fedmllm.models.pocket.scenes import COLORS, SHAPES, WORDS, Scene, Thing

Pair = tuple[str, str]
LETTERS = "ABCDEF"
NUMBERS = ("none", "one", "two", "three", "four")
ANSWERS = {"color_of": list(COLORS), "shape_of": SHAPES, "reading": WORDS, "counting": NUMBERS}
"""The wrong options of lettered questions, by who asks; the others are answered yes or no."""
LETTER_RULE = "Answer with the letter of the right option."


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _other(rng: np.random.Generator, options: Sequence[str], not_these: set[str]) -> str:
    return _pick(rng, [option for option in options if option not in not_these])


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _phrase(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _unique(things: Sequence[Thing], key: Callable[[Thing], str]) -> list[Thing]:
    counts = Counter(key(thing) for thing in things)
    return [thing for thing in things if counts[key(thing)] == 1]


def caption(scene: Scene, rng: np.random.Generator) -> Pair:
    """Every thing in reading order, then the word: the densest supervision a picture gives."""
    ordered = sorted(scene.things, key=lambda t: (t.y, t.x))
    said = [f"{_article(_phrase(thing))} at the {thing.place}" for thing in ordered]
    text = "; ".join(said) + (f"; the word {scene.word}" if scene.word else "")
    ask = _pick(rng, ("Describe the picture.", "Say all that the picture shows.", "Write a caption."))
    return ask, text + "."


def color_of(scene: Scene, rng: np.random.Generator) -> Pair | None:
    if len(scene.things) == 1 and rng.random() < 0.5:
        ask = ("Name the color of the object.", "Which color was used?", "The object has which color?")
        return _pick(rng, ask), scene.things[0].color
    if not (known := _unique(scene.things, lambda t: t.shape)):
        return None
    thing = known[int(rng.integers(len(known)))]
    ask = ("Name the color of the {}.", "Which color has the {}?", "The {} is painted in which color?")
    return _pick(rng, ask).format(thing.shape), thing.color


def shape_of(scene: Scene, rng: np.random.Generator) -> Pair | None:
    if len(scene.things) == 1 and rng.random() < 0.5:
        ask = ("Name the shape of the object.", "Which shape was drawn?", "The object has which form?")
        return _pick(rng, ask), scene.things[0].shape
    if not (known := _unique(scene.things, lambda t: t.color)):
        return None
    thing = known[int(rng.integers(len(known)))]
    ask = ("Name the shape of the {} object.", "Which shape is {}?", "The {} object has which form?")
    return _pick(rng, ask).format(thing.color), thing.shape


def presence(scene: Scene, rng: np.random.Generator) -> Pair:
    """Is there such a thing, asked for a shape, a color or both, plainly or negated."""
    kind = int(rng.integers(3))
    there: set[str] = {(t.shape, f"{t.color} object", _phrase(t))[kind] for t in scene.things}
    every = (SHAPES, [f"{c} object" for c in COLORS], [f"{c} {s}" for c in COLORS for s in SHAPES])[kind]
    exists = rng.random() < 0.5
    if exists:
        said = _pick(rng, sorted(there))
    elif kind == 2 and rng.random() < 0.7:  # near misses: right color with a wrong shape, or the reverse
        thing = scene.things[int(rng.integers(len(scene.things)))]
        near = [f"{thing.color} {s}" for s in SHAPES] + [f"{c} {thing.shape}" for c in COLORS]
        said = _other(rng, near, there)
    else:
        said = _other(rng, every, there)
    plain = ("Can you see {a}?", "Does one find {a} here?", "Has the picture got {a}?", "Is {a} drawn here?")
    negated = ("Is the picture without {a}?", "Is it true that {a} is missing?", "Is the picture free of any {n}?")
    if rng.random() < 0.6:
        return _pick(rng, plain).format(a=_article(said), n=said), "yes" if exists else "no"
    return _pick(rng, negated).format(a=_article(said), n=said), "no" if exists else "yes"


def counting(scene: Scene, rng: np.random.Generator) -> Pair:
    if rng.random() < 0.4:
        return "How many objects are drawn?", NUMBERS[len(scene.things)]
    shape = _pick(rng, [t.shape for t in scene.things] + [_pick(rng, SHAPES)])
    return f"Count each {shape}.", NUMBERS[sum(t.shape == shape for t in scene.things)]


def place_of(scene: Scene, rng: np.random.Generator) -> Pair | None:
    if not (known := _unique(scene.things, _phrase)):
        return None
    thing = known[int(rng.integers(len(known)))]
    return _pick(rng, ("Where is the {}?", "Find the {}.")).format(_phrase(thing)), thing.place


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
    return _pick(rng, ("Read the word.", "Which word is written?", "What is written in the picture?")), scene.word


def lettered(pair: Pair, distractors: Sequence[str], rng: np.random.Generator) -> Pair:
    """The same question as multiple choice, answered as "(B) red"."""
    question, answer = pair
    wrong = [d for d in dict.fromkeys(distractors) if d != answer]
    wrong = [wrong[int(i)] for i in rng.permutation(len(wrong))[: int(rng.integers(1, min(5, len(wrong)) + 1))]]
    options = [answer, *wrong]
    options = [options[int(i)] for i in rng.permutation(len(options))]
    lines = "".join(f"({LETTERS[i]}) {option}\n" for i, option in enumerate(options))
    return f"{question}\n{lines}{LETTER_RULE}", f"({LETTERS[options.index(answer)]}) {answer}"


Ask = Callable[[Scene, np.random.Generator], Pair | None]
EVENLY: tuple[Ask, ...] = (color_of, shape_of, presence, presence, presence, counting, place_of, relation, reading)
MOSTLY_PRESENCE: tuple[Ask, ...] = (color_of, shape_of, *[presence] * 7, place_of)


def ask_scene(scene: Scene, rng: np.random.Generator, how_many: int, asks: Sequence[Ask] = EVENLY) -> list[Pair]:
    """A caption and `how_many` questions about one picture; about one question in seven is lettered."""
    pairs = [caption(scene, rng)]
    while len(pairs) <= how_many:
        ask = asks[int(rng.integers(len(asks)))] if scene.word is None or rng.random() < 0.7 else reading
        if (pair := ask(scene, rng)) is None:
            continue
        distractors: Sequence[str] = ANSWERS.get(ask.__name__, ("yes", "no"))
        if ask is not place_of and rng.random() < 0.15:
            pair = lettered(pair, distractors, rng)
        pairs.append(pair)
    return pairs


def ask_text(rng: np.random.Generator) -> Pair:
    """A question that a text alone answers: facts about two or three things, then one of them asked back."""
    number = int(rng.integers(1, 4))
    shapes = [SHAPES[int(i)] for i in rng.permutation(len(SHAPES))[:number]]
    colors = [list(COLORS)[int(i)] for i in rng.permutation(len(COLORS))[:number]]
    style = int(rng.integers(3))
    names = [f"{c} {s}" for c, s in zip(colors, shapes, strict=True)]
    if style == 0:
        facts = "There is " + " and ".join(_article(name) for name in names) + "."
    elif style == 1:
        facts = " ".join(f"The {s} is {c}." for c, s in zip(colors, shapes, strict=True))
    else:
        facts = "One sees " + ", ".join(_article(name) for name in names) + "."
    i = int(rng.integers(number))
    kind = int(rng.integers(4))
    if kind == 0:
        pair, distractors = (
            (_pick(rng, ("Name the color of the {}.", "Which color has the {}?")).format(shapes[i]), colors[i]),
            list(COLORS),
        )
    elif kind == 1:
        pair, distractors = (
            (_pick(rng, ("Name the shape of the {} object.", "Which shape is {}?")).format(colors[i]), shapes[i]),
            list(SHAPES),
        )
    elif kind == 2:
        exists = rng.random() < 0.5
        near = [f"{colors[i]} {s}" for s in SHAPES] + [f"{c} {shapes[i]}" for c in COLORS]
        said = names[i] if exists else _other(rng, near, set(names))
        pair, distractors = (f"Does the text name {_article(said)}?", "yes" if exists else "no"), ["yes", "no"]
    else:
        pair, distractors = ("How many objects are named?", NUMBERS[number]), list(NUMBERS)
    if rng.random() < 0.15:
        pair = lettered(pair, distractors, rng)
    return f"{facts}\n{pair[0]}", pair[1]


PROMPT_WORDS = (
    "Based on the image and the text, which option is right? Based on the image, based on the text, without considering "
    "the modality. Text: Question: Options: Answer: true false hateful not hateful picture post tweet disaster class "
    "what is the are there in of to and or a an this that does contain shape color object present image question"
)
"""Words of the benchmark's prompts, so that the tokenizer does not break them into bytes."""
