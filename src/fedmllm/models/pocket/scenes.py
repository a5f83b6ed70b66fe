"""Generated pictures for pre-training: a few coloured shapes, sometimes a short word, on a plain background.

A scene is drawn from a generator alone, so picture `i` of a run is the same on every machine. Nothing here comes
from a data set; the benchmark's own pictures are never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64
"""Pixels along each edge of a picture."""

COLORS: dict[str, tuple[int, int, int]] = {
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
WORDS = (
    "stop go left right open shut hot cold north south east west day night sun moon rain snow fire water help exit "
    "push pull up down in out on off yes no map bus car boat tree leaf bird fish cat dog bread milk salt tea red one "
    "two ten north safe risk blood lung heart bone skin scan news flood storm"
).split()
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")


@dataclass(frozen=True)
class Thing:
    """One shape: `x`, `y` its centre and `half` half its extent, all in pixels."""

    shape: str
    color: str
    x: float
    y: float
    half: float

    @property
    def place(self) -> str:
        """Where it is on a 3 × 3 grid, in words: "top left", "center", "bottom"."""
        row = ROWS[min(int(self.y * 3 / SIZE), 2)]
        column = COLUMNS[min(int(self.x * 3 / SIZE), 2)]
        words = [word for word in (row, column) if word not in ("middle", "center")]
        return " ".join(words) or "center"


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    word: str | None
    image: Image.Image


def cells(scene: Scene, grid: int) -> tuple[list[int], list[int]]:
    """For each of `grid` × `grid` cells, row by row: the number of the colour and of the shape whose centre is in it.

    0 is an empty cell, −100 one that a thing only reaches into: neither empty nor its place.
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
        colors[index], shapes[index] = list(COLORS).index(thing.color) + 1, SHAPES.index(thing.shape) + 1
    return colors, shapes


def _polygon(thing: Thing, scale: int) -> list[tuple[float, float]]:
    outlines: dict[str, list[tuple[float, float]]] = {
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


def _jitter(color: tuple[int, int, int], rng: np.random.Generator, amount: int) -> tuple[int, int, int]:
    shifted = np.clip(np.array(color) + rng.integers(-amount, amount + 1, size=3), 0, 255)
    return int(shifted[0]), int(shifted[1]), int(shifted[2])


def _background(rng: np.random.Generator, taken: set[str]) -> tuple[int, int, int]:
    if "white" in taken or rng.random() < 0.15:  # a white shape needs something darker behind it
        level = rng.integers(70, 110) if "gray" not in taken else rng.integers(30, 60)
        return _jitter((int(level),) * 3, rng, 12)
    light = rng.integers(225, 256, size=3)
    return int(light[0]), int(light[1]), int(light[2])


def draw_scene(rng: np.random.Generator, most_things: int, single: float = 0.45) -> Scene:
    """One picture with 1 to `most_things` shapes that do not overlap; about one in eight carries a word as well.

    A share `single` of the pictures has one thing whatever `most_things` is.
    """
    wanted = 1 if rng.random() < single else int(rng.integers(1, most_things + 1))
    word = str(rng.choice(WORDS)) if rng.random() < 0.12 else None
    # The word has the lowest fifth of the picture to itself.
    floor = SIZE * (0.78 if word else 1.0)
    things: list[Thing] = []
    for _ in range(wanted * 8):
        if len(things) == wanted:
            break
        half = float(rng.uniform(5, 17) if wanted == 1 else rng.uniform(5, 10))
        x, y = float(rng.uniform(half, SIZE - half)), float(rng.uniform(half, floor - half))
        if any(abs(t.x - x) < t.half + half + 1 and abs(t.y - y) < t.half + half + 1 for t in things):
            continue
        shape = str(rng.choice(SHAPES[:3] if rng.random() < 0.6 else SHAPES))
        things.append(Thing(shape, str(rng.choice(list(COLORS))), x, y, half))
    colors = {t.color for t in things}
    scale = 3  # drawn large and reduced: smooth edges at any position
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), _background(rng, colors))
    pen = ImageDraw.Draw(image)
    for thing in things:
        fill = _jitter(COLORS[thing.color], rng, 10)
        if thing.shape in ("circle", "rectangle"):
            # A rectangle need not be square: one side keeps the extent, the other shrinks.
            sides = np.ones(2)
            if thing.shape == "rectangle":
                sides = rng.permutation(np.array([1.0, rng.uniform(0.45, 1.0)]))
            sx, sy = float(sides[0]), float(sides[1])
            box = [(thing.x - thing.half * sx) * scale, (thing.y - thing.half * sy) * scale]
            box += [(thing.x + thing.half * sx) * scale, (thing.y + thing.half * sy) * scale]
            (pen.ellipse if thing.shape == "circle" else pen.rectangle)(box, fill=fill)
        else:
            pen.polygon(_polygon(thing, scale), fill=fill)
    if word:
        font = ImageFont.load_default(size=13 * scale)
        ink = (20, 20, 20) if sum(image.getpixel((1, 1))) > 380 else (235, 235, 235)  # type: ignore[arg-type]
        pen.text((SIZE * scale / 2, SIZE * scale - 3), word, fill=ink, font=font, anchor="mb")
    return Scene(tuple(things), word, image.resize((SIZE, SIZE), Image.Resampling.BOX))
