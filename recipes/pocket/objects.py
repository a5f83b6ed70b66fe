"""Simple drawings of everyday things for pre-training, each a few ellipses, polygons and lines in one main colour.

Written for this package, stroke by stroke; no drawing of any emoji set was traced or looked at. Coordinates go from −1
to 1 around the thing's centre, y downwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]


class Part(NamedTuple):
    """One stroke.

    `kind`: "ellipse" and "box" by two corners, "pie" (the ellipse's upper half), "polygon", "line";
    `paint`: "main", "dark", "light" or "ink".
    """

    kind: str
    paint: str
    points: tuple[Point, ...]


def _ellipse(paint: str, x: float, y: float, rx: float, ry: float | None = None) -> Part:
    ry = rx if ry is None else ry
    return Part("ellipse", paint, ((x - rx, y - ry), (x + rx, y + ry)))


def _box(paint: str, left: float, top: float, right: float, bottom: float) -> Part:
    return Part("box", paint, ((left, top), (right, bottom)))


def _polygon(paint: str, *points: Point) -> Part:
    return Part("polygon", paint, points)


def _line(paint: str, *points: Point) -> Part:
    return Part("line", paint, points)


def _round(count: int, radius: float, start: float = 0.0) -> list[Point]:
    angles = [start + 2 * np.pi * k / count for k in range(count)]
    return [(float(radius * np.sin(a)), float(-radius * np.cos(a))) for a in angles]


def _heart() -> tuple[Point, ...]:
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    x, y = np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return tuple((float(a), float(b)) for a, b in zip(x, y, strict=True))


def _gear() -> tuple[Point, ...]:
    edges = _round(16, 1.0, 0.1)
    return tuple((x * r, y * r) for (x, y), r in zip(edges, [1.0, 1.0, 0.72, 0.72] * 4, strict=True))


OBJECTS: dict[str, tuple[Part, ...]] = {
    "house": (
        _box("main", -0.75, -0.1, 0.75, 1),
        _polygon("dark", (-1, -0.1), (0, -1), (1, -0.1)),
        _box("light", -0.2, 0.4, 0.2, 1),
    ),
    "tree": (_box("ink", -0.15, 0.2, 0.15, 1), _ellipse("main", 0, -0.3, 0.75, 0.7)),
    "car": (
        _polygon("main", (-1, 0.5), (-1, 0), (-0.6, -0.05), (-0.35, -0.5), (0.4, -0.5), (0.65, -0.05), (1, 0), (1, 0.5)),
        _box("light", -0.25, -0.35, 0.3, -0.05),
        _ellipse("ink", -0.55, 0.5, 0.26),
        _ellipse("ink", 0.55, 0.5, 0.26),
    ),
    "boat": (
        _polygon("dark", (-1, 0.3), (1, 0.3), (0.6, 0.9), (-0.6, 0.9)),
        _line("ink", (0, 0.3), (0, -1)),
        _polygon("main", (0.1, -0.95), (0.85, 0.15), (0.1, 0.15)),
    ),
    "fish": (
        _polygon("dark", (0.4, 0), (1, -0.6), (1, 0.6)),
        _ellipse("main", -0.2, 0, 0.8, 0.5),
        _ellipse("ink", -0.6, -0.12, 0.1),
    ),
    "bird": (
        _ellipse("main", -0.1, 0.1, 0.7, 0.5),
        _ellipse("main", 0.5, -0.45, 0.35),
        _polygon("dark", (0.8, -0.55), (1, -0.4), (0.8, -0.3)),
        _polygon("dark", (-0.4, 0), (0.3, 0), (-0.2, 0.5)),
        _ellipse("ink", 0.55, -0.5, 0.08),
        _line("ink", (0, 0.6), (0, 1)),
    ),
    "cat": (
        _polygon("dark", (-0.8, -0.1), (-0.75, -1), (-0.1, -0.6)),
        _polygon("dark", (0.8, -0.1), (0.75, -1), (0.1, -0.6)),
        _ellipse("main", 0, 0.15, 0.85, 0.8),
        _ellipse("ink", -0.35, 0, 0.12),
        _ellipse("ink", 0.35, 0, 0.12),
        _polygon("light", (-0.12, 0.35), (0.12, 0.35), (0, 0.5)),
    ),
    "bear": (
        _ellipse("dark", -0.65, -0.6, 0.33),
        _ellipse("dark", 0.65, -0.6, 0.33),
        _ellipse("main", 0, 0.15, 0.85, 0.8),
        _ellipse("light", 0, 0.45, 0.4, 0.32),
        _ellipse("ink", -0.35, -0.1, 0.1),
        _ellipse("ink", 0.35, -0.1, 0.1),
        _ellipse("ink", 0, 0.35, 0.12, 0.09),
    ),
    "face": (
        _ellipse("main", 0, 0, 1),
        _ellipse("ink", -0.35, -0.25, 0.12, 0.16),
        _ellipse("ink", 0.35, -0.25, 0.12, 0.16),
        _line("ink", (-0.5, 0.3), (-0.25, 0.55), (0.25, 0.55), (0.5, 0.3)),
    ),
    "person": (
        _ellipse("light", 0, -0.65, 0.33),
        _polygon("main", (-0.55, 1), (-0.45, -0.2), (0.45, -0.2), (0.55, 1)),
        _line("dark", (-0.45, -0.1), (-0.85, 0.5)),
        _line("dark", (0.45, -0.1), (0.85, 0.5)),
    ),
    "hand": (
        _box("main", -0.5, -0.1, 0.45, 1),
        _box("main", -0.5, -0.85, -0.3, 0),
        _box("main", -0.22, -1, -0.02, 0),
        _box("main", 0.05, -0.9, 0.25, 0),
        _box("main", 0.3, -0.6, 0.48, 0),
        _polygon("dark", (0.45, 0.6), (0.95, 0), (0.8, -0.15), (0.45, 0.2)),
    ),
    "eye": (
        _polygon("light", (-1, 0), (-0.4, -0.5), (0.4, -0.5), (1, 0), (0.4, 0.5), (-0.4, 0.5)),
        _ellipse("main", 0, 0, 0.42),
        _ellipse("ink", 0, 0, 0.18),
    ),
    "flower": (
        _line("ink", (0, 0), (0, 1)),
        *[_ellipse("main", x, y - 0.3, 0.32) for x, y in _round(5, 0.42)],
        _ellipse("light", 0, -0.3, 0.22),
    ),
    "leaf": (
        _polygon("main", (0, -1), (0.6, -0.4), (0.5, 0.4), (0, 0.8), (-0.5, 0.4), (-0.6, -0.4)),
        _line("dark", (0, -0.7), (0, 1)),
    ),
    "mushroom": (
        _box("light", -0.28, 0, 0.28, 0.95),
        Part("pie", "main", ((-1, -0.9), (1, 1.0))),
        _ellipse("light", -0.35, -0.35, 0.16),
        _ellipse("light", 0.3, -0.4, 0.18),
    ),
    "sun": (*[_line("main", (0, 0), p) for p in _round(8, 1.0)], _ellipse("main", 0, 0, 0.55)),
    "moon": (
        _polygon("main", *[(0.8 * x, y) for x, y in _round(20, 1.0)[10:]], (-0.1, -1), (-0.25, -0.5), (-0.25, 0.5), (-0.1, 1)),
    ),
    "cloud": (
        _ellipse("main", -0.45, 0.15, 0.5, 0.4),
        _ellipse("main", 0.45, 0.15, 0.52, 0.4),
        _ellipse("main", 0, -0.15, 0.5),
    ),
    "apple": (
        _ellipse("main", -0.3, 0.2, 0.55, 0.72),
        _ellipse("main", 0.3, 0.2, 0.55, 0.72),
        _line("ink", (0, -0.4), (0.12, -1)),
        _ellipse("dark", 0.4, -0.75, 0.28, 0.15),
    ),
    "cherry": (
        _line("ink", (-0.45, 0.4), (0.2, -0.9), (0.5, 0.4)),
        _ellipse("main", -0.5, 0.5, 0.42),
        _ellipse("main", 0.5, 0.5, 0.42),
    ),
    "cup": (
        _ellipse("dark", 0.62, 0.1, 0.36, 0.4),
        _ellipse("light", 0.62, 0.1, 0.18, 0.22),
        _polygon("main", (-0.8, -0.6), (0.6, -0.6), (0.45, 0.8), (-0.65, 0.8)),
    ),
    "bottle": (
        _box("dark", -0.17, -1, 0.17, -0.35),
        _box("main", -0.42, -0.35, 0.42, 1),
        _box("light", -0.42, 0.05, 0.42, 0.55),
    ),
    "cake": (
        _box("main", -0.9, 0, 0.9, 0.9),
        _box("light", -0.9, -0.1, 0.9, 0.2),
        _line("ink", (0, -0.1), (0, -0.65)),
        _ellipse("dark", 0, -0.8, 0.13, 0.2),
    ),
    "key": (
        _ellipse("main", -0.55, 0, 0.43),
        _ellipse("light", -0.55, 0, 0.18),
        _box("main", -0.2, -0.1, 1, 0.12),
        _box("main", 0.75, 0, 0.95, 0.45),
        _box("main", 0.45, 0, 0.6, 0.4),
    ),
    "book": (
        _polygon("main", (-1, -0.6), (0, -0.4), (1, -0.6), (1, 0.6), (0, 0.8), (-1, 0.6)),
        _line("ink", (0, -0.4), (0, 0.8)),
    ),
    "clock": (
        _ellipse("main", 0, 0, 1),
        _ellipse("light", 0, 0, 0.78),
        _line("ink", (0, 0.05), (0, -0.6)),
        _line("ink", (0, 0), (0.42, 0.2)),
    ),
    "lamp": (
        _polygon("main", (-0.45, -0.9), (0.45, -0.9), (0.85, 0.1), (-0.85, 0.1)),
        _line("ink", (0, 0.1), (0, 0.9)),
        _box("dark", -0.5, 0.8, 0.5, 1),
    ),
    "gift": (
        _box("main", -0.85, -0.3, 0.85, 0.95),
        _box("light", -0.16, -0.3, 0.16, 0.95),
        _ellipse("dark", -0.32, -0.55, 0.3, 0.22),
        _ellipse("dark", 0.32, -0.55, 0.3, 0.22),
    ),
    "umbrella": (Part("pie", "main", ((-1, -0.9), (1, 0.9))), _line("ink", (0, 0), (0, 0.9), (0.3, 0.9))),
    "hat": (_box("main", -0.5, -0.8, 0.5, 0.45), _box("dark", -1, 0.4, 1, 0.65), _box("light", -0.5, 0.1, 0.5, 0.3)),
    "shirt": (
        _polygon(
            "main",
            (-0.4, -0.8),
            (0.4, -0.8),
            (1, -0.4),
            (0.75, 0),
            (0.5, -0.15),
            (0.5, 0.9),
            (-0.5, 0.9),
            (-0.5, -0.15),
            (-0.75, 0),
            (-1, -0.4),
        ),
    ),
    "bell": (
        _polygon("main", (-0.25, -0.8), (0.25, -0.8), (0.55, 0.2), (0.9, 0.55), (-0.9, 0.55), (-0.55, 0.2)),
        _ellipse("dark", 0, 0.7, 0.2),
    ),
    "ball": (_ellipse("main", 0, 0, 1), _line("light", (-0.95, 0), (0.95, 0)), _line("light", (0, -0.95), (0, 0.95))),
    "flag": (_line("ink", (-0.8, -1), (-0.8, 1)), _polygon("main", (-0.75, -0.9), (0.95, -0.75), (0.95, 0.25), (-0.75, 0.1))),
    "banner": (_box("main", -1, -0.65, 1, 0.65), _box("light", -1, -0.22, 1, 0.22)),
    "arrow": (_polygon("main", (-1, -0.25), (0.1, -0.25), (0.1, -0.7), (1, 0), (0.1, 0.7), (0.1, 0.25), (-1, 0.25)),),
    "heart": (_polygon("main", *_heart()),),
    "ring": (_ellipse("main", 0, 0, 1), _ellipse("light", 0, 0, 0.55)),
    "gear": (_polygon("main", *_gear()), _ellipse("light", 0, 0, 0.3)),
    "rocket": (
        _polygon("dark", (-0.75, 0.85), (-0.3, 0.1), (0.3, 0.1), (0.75, 0.85)),
        _polygon("main", (0, -1), (0.4, -0.4), (0.35, 0.75), (-0.35, 0.75), (-0.4, -0.4)),
        _ellipse("light", 0, -0.2, 0.18),
    ),
    "train": (
        _box("main", -0.75, -0.9, 0.75, 0.7),
        _box("light", -0.55, -0.65, 0.55, -0.1),
        _ellipse("ink", -0.45, 0.8, 0.2),
        _ellipse("ink", 0.45, 0.8, 0.2),
    ),
    "ladder": (
        _line("main", (-0.45, -1), (-0.45, 1)),
        _line("main", (0.45, -1), (0.45, 1)),
        *[_line("main", (-0.45, y), (0.45, y)) for y in (-0.7, -0.25, 0.2, 0.65)],
    ),
}


def _shade(color: RGB, towards: int, amount: float) -> RGB:
    r, g, b = (round(c + (towards - c) * amount) for c in color)
    return r, g, b


def draw_object(
    pen: ImageDraw.ImageDraw, name: str, place: Callable[[Point], Point], half: float, fill: RGB, outlined: bool
) -> None:
    """Draw `name` with the main colour `fill`. `place` maps its coordinates to the picture's, whose pixels `half` counts."""
    dark_thing = sum(fill) < 200
    paints: dict[str, RGB] = {
        "main": fill,
        "dark": _shade(fill, 255 if dark_thing else 0, 0.35),
        "light": _shade(fill, 255, 0.75),
        "ink": (110, 110, 110) if dark_thing else (25, 25, 25),
    }
    edge = (10, 10, 10) if outlined else None
    width = max(1, round(half * 0.09))
    for part in OBJECTS[name]:
        at, paint = [place(point) for point in part.points], paints[part.paint]
        if part.kind == "line":
            pen.line(at, fill=paint, width=max(2, round(half * 0.2)), joint="curve")
        elif part.kind == "polygon":
            pen.polygon(at, fill=paint, outline=edge, width=width)
        else:
            (left, top), (right, bottom) = at
            box = (min(left, right), top, max(left, right), bottom)
            if part.kind == "pie":
                pen.pieslice(box, 180, 360, fill=paint, outline=edge, width=width)
            else:
                (pen.ellipse if part.kind == "ellipse" else pen.rectangle)(box, fill=paint, outline=edge, width=width)
