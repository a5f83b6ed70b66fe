"""Generated pictures for pre-training: a few coloured shapes and simple objects, sometimes a short word, on a plain background.

A scene depends on its random generator alone, so picture `i` of a run is the same on every machine. Nothing comes from a
data set, and no picture of the benchmark is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipes.pocket.objects import OBJECTS
from recipes.pocket.strokes import RGB, Point, draw_strokes
from recipes.pocket.words import READABLE

SIZE = 64
"""Width and height of a picture, in pixels."""

COLORS: dict[str, RGB] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "red": (235, 20, 20),
    "blue": (20, 40, 235),
    "green": (20, 200, 30),
    "yellow": (250, 235, 20),
    "teal": (0, 128, 128),
    "brown": (150, 65, 35),
    "orange": (255, 150, 10),
    "purple": (130, 30, 160),
    "pink": (255, 130, 190),
}
SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "diamond")
NAMES = (*SHAPES, *OBJECTS)
"""Names of everything that can be drawn."""
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
SLOTS = 3
"""Number of letters per cell that are labelled."""
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")


@dataclass(frozen=True)
class Thing:
    """One shape or object. `x` and `y` are its centre and `half` is half its extent, all in pixels."""

    shape: str
    color: str
    x: float
    y: float
    half: float

    @property
    def place(self) -> str:
        """Its position on a 3 × 3 grid, in words: "top left", "center", "bottom"."""
        row = ROWS[min(int(self.y * 3 / SIZE), 2)]
        column = COLUMNS[min(int(self.x * 3 / SIZE), 2)]
        words = [word for word in (row, column) if word not in ("middle", "center")]
        return " ".join(words) or "center"


@dataclass(frozen=True)
class Scene:
    """A picture and what it shows. `letters`: (letter, x and y of its centre) for each letter of `word`, left to right."""

    things: tuple[Thing, ...]
    word: str | None
    image: Image.Image
    letters: tuple[tuple[str, float, float], ...] = ()


def cells(scene: Scene, grid: int) -> tuple[list[int], list[int]]:
    """The colour and shape labels of `grid` × `grid` cells, row by row.

    A label is the number of the colour or shape whose centre is in the cell, counted from 1. It is 0 for an empty cell and
    −100 (ignored) for a cell that a thing overlaps without having its centre there.
    """
    edge = SIZE / grid
    colors, shapes = [0] * grid**2, [0] * grid**2
    for thing in scene.things:
        for index in range(grid**2):
            top, left = (index // grid) * edge, (index % grid) * edge
            if abs(left + edge / 2 - thing.x) < edge / 2 + thing.half and abs(top + edge / 2 - thing.y) < edge / 2 + thing.half:
                colors[index] = shapes[index] = -100
    for thing in scene.things:
        index = min(int(thing.y / edge), grid - 1) * grid + min(int(thing.x / edge), grid - 1)
        colors[index], shapes[index] = list(COLORS).index(thing.color) + 1, NAMES.index(thing.shape) + 1
    return colors, shapes


def letter_cells(scene: Scene, grid: int) -> list[list[int]]:
    """The numbers of the first `SLOTS` letters whose centres are in each cell, left to right, padded with 0."""
    edge = SIZE / grid
    numbers: list[list[int]] = [[] for _ in range(grid**2)]
    for letter, x, y in scene.letters:
        index = min(int(y / edge), grid - 1) * grid + min(int(x / edge), grid - 1)
        numbers[index].append(ALPHABET.index(letter) + 1)
    return [(in_cell + [0] * SLOTS)[:SLOTS] for in_cell in numbers]


def _outline(thing: Thing, scale: int) -> list[Point]:
    outlines: dict[str, list[Point]] = {
        "triangle": [(0, -1), (1, 1), (-1, 1)],
        "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
        "cross": [(-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35)]
        + [(0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35)],
        "star": [
            (np.sin(k * np.pi / 5) * (1.0 if k % 2 == 0 else 0.42), -np.cos(k * np.pi / 5) * (1.0 if k % 2 == 0 else 0.42))
            for k in range(10)
        ],
    }
    points = outlines[thing.shape]
    return [((thing.x + dx * thing.half) * scale, (thing.y + dy * thing.half) * scale) for dx, dy in points]


def _jitter(color: RGB, rng: np.random.Generator, amount: int) -> RGB:
    shifted = np.clip(np.array(color) + rng.integers(-amount, amount + 1, size=3), 0, 255)
    return int(shifted[0]), int(shifted[1]), int(shifted[2])


def _background(rng: np.random.Generator, colors: set[str]) -> RGB:
    """A colour on which things of `colors` can be seen."""
    if "white" in colors or rng.random() < 0.15:  # a white shape needs a darker background
        level = rng.integers(70, 110) if "gray" not in colors else rng.integers(30, 60)
        return _jitter((int(level),) * 3, rng, 12)
    light = rng.integers(225, 256, size=3) if rng.random() < 0.7 else np.full(3, 255)
    return int(light[0]), int(light[1]), int(light[2])


@dataclass(frozen=True)
class Mix:
    """The probabilities with which scenes are drawn."""

    single: float = 0.45
    """That a picture with things has exactly one."""
    word: float = 0.3
    """That a picture has a word."""
    word_alone: float = 0.4
    """That a picture with a word has nothing else."""
    letters: float = 0.0
    """That a word is a sequence of random letters."""
    objects: float = 0.45
    """That a thing is an object, not a shape."""
    most_things: int = 3
    """Largest number of things per picture."""


def _word(rng: np.random.Generator, mix: Mix) -> str:
    if rng.random() >= mix.letters:
        return READABLE[int(rng.integers(len(READABLE)))]
    return "".join(ALPHABET[int(i)] for i in rng.integers(len(ALPHABET), size=int(rng.integers(2, 7))))


def _place_things(rng: np.random.Generator, mix: Mix, count: int, top: float, bottom: float) -> list[Thing]:
    """Up to `count` things that do not overlap, between the heights `top` and `bottom`."""
    things: list[Thing] = []
    largest = min(24.0, (bottom - top) / 2 - 1)
    for _ in range(count * 8):
        if len(things) == count:
            break
        is_object = rng.random() < mix.objects
        smallest = 8.0 if is_object else 5.0
        half = float(rng.uniform(smallest, largest if count == 1 else max(smallest + 1, 15 - 2 * count)))
        x, y = float(rng.uniform(half, SIZE - half)), float(rng.uniform(top + half, bottom - half))
        if any(abs(t.x - x) < t.half + half + 1 and abs(t.y - y) < t.half + half + 1 for t in things):
            continue
        if is_object:
            shape = list(OBJECTS)[int(rng.integers(len(OBJECTS)))]
        else:
            shape = str(rng.choice(SHAPES[:3] if rng.random() < 0.6 else SHAPES))
        things.append(Thing(shape, list(COLORS)[int(rng.integers(len(COLORS)))], x, y, half))
    return things


def _draw_object(
    pen: ImageDraw.ImageDraw, thing: Thing, scale: int, fill: RGB, outlined: bool, rng: np.random.Generator
) -> None:
    """Draw an object slightly squeezed and slanted, mirrored half the time."""
    stretch, slant = rng.uniform(0.8, 1.0, size=2), float(rng.uniform(-0.12, 0.12))
    flip = -1.0 if rng.random() < 0.5 and thing.shape != "arrow" else 1.0

    def to_pixels(point: Point) -> Point:
        dx, dy = flip * point[0] * stretch[0] + slant * point[1], point[1] * stretch[1]
        return float((thing.x + dx * thing.half) * scale), float((thing.y + dy * thing.half) * scale)

    draw_strokes(pen, OBJECTS[thing.shape], to_pixels, thing.half * scale, fill, outlined)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, scale: int, rng: np.random.Generator) -> None:
    fill = _jitter(COLORS[thing.color], rng, 10)
    outlined = rng.random() < 0.3
    edge, width = ((10, 10, 10) if outlined else None), max(1, round(thing.half * scale * 0.1))
    if thing.shape in OBJECTS:
        _draw_object(pen, thing, scale, fill, outlined, rng)
    elif thing.shape in ("circle", "rectangle"):
        # A rectangle need not be square: one side keeps the extent, and the other shrinks.
        sides = np.ones(2)
        if thing.shape == "rectangle":
            sides = rng.permutation(np.array([1.0, rng.uniform(0.45, 1.0)]))
        sx, sy = float(sides[0]), float(sides[1])
        box = [(thing.x - thing.half * sx) * scale, (thing.y - thing.half * sy) * scale]
        box += [(thing.x + thing.half * sx) * scale, (thing.y + thing.half * sy) * scale]
        (pen.ellipse if thing.shape == "circle" else pen.rectangle)(box, fill=fill, outline=edge, width=width)
    else:
        pen.polygon(_outline(thing, scale), fill=fill, outline=edge, width=width)


FONTS = {size: ImageFont.load_default(size=size) for size in range(33, 67)}
"""Pillow's own font (Aileron), so that words look the same on every machine. Sizes are in pixels of the enlarged drawing."""


def _write(
    pen: ImageDraw.ImageDraw, word: str, strip: tuple[float, float], scale: int, dark: bool, rng: np.random.Generator
) -> tuple[tuple[str, float, float], ...]:
    """Write `word` on one line between the two heights of `strip`, in light ink if the background is `dark`.

    Return the letters with the coordinates of their centres, as in `Scene.letters`.
    """
    top, bottom = strip
    shown = word.upper() if rng.random() < 0.3 else word
    bold = int(rng.random() < 0.4)
    largest = min(66, int((bottom - top) * scale))
    sizes = [s for s in FONTS if s <= largest and FONTS[s].getlength(shown) + 2 * bold <= (SIZE - 3) * scale]
    height = sizes[int(rng.integers(len(sizes)))] if sizes else min(FONTS)
    font = FONTS[height]
    width, size = font.getlength(shown) / scale, height / scale
    left = float(rng.uniform(1, max(1.01, SIZE - 2 - width)))
    y = float(rng.uniform(top, max(top + 0.01, bottom - size))) + size / 2
    ink: list[int] = [int(v) for v in rng.integers(0, 90, size=3)]
    if dark:
        ink = [255 - v for v in ink]
    color = (ink[0], ink[1], ink[2])
    pen.text((left * scale, y * scale), shown, fill=color, font=font, anchor="lm", stroke_width=bold, stroke_fill=color)
    ends = [left + font.getlength(shown[:i]) / scale for i in range(len(shown) + 1)]
    return tuple((letter, (ends[i] + ends[i + 1]) / 2, y) for i, letter in enumerate(word))


def draw_scene(rng: np.random.Generator, mix: Mix = Mix()) -> Scene:
    """Draw things that do not overlap, a word, or both; then the word has its own strip at the top or the bottom."""
    word = _word(rng, mix) if rng.random() < mix.word else None
    alone = word is not None and rng.random() < mix.word_alone
    count = 0 if alone else 1 if rng.random() < mix.single else int(rng.integers(1, mix.most_things + 1))
    above = rng.random() < 0.5
    strip = (0.0, SIZE) if alone else (1.0, 20.0) if above else (SIZE - 20.0, SIZE - 1.0)
    room = (0.0, float(SIZE)) if word is None else (20.0, float(SIZE)) if above else (0.0, SIZE - 20.0)
    things = _place_things(rng, mix, count, *room)
    scale = 3  # drawn enlarged and then reduced, for smooth edges at any position
    background = _background(rng, {t.color for t in things})
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), background)
    pen = ImageDraw.Draw(image)
    for thing in things:
        _draw_thing(pen, thing, scale, rng)
    letters = _write(pen, word, strip, scale, sum(background) < 380, rng) if word else ()
    return Scene(tuple(things), word, image.resize((SIZE, SIZE), Image.Resampling.BOX), letters)
