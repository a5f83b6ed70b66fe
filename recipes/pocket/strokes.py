"""The strokes that objects are drawn with.

Coordinates go from −1 to 1 around the centre of the object, with y pointing down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]


class Stroke(NamedTuple):
    """One ellipse, polygon or line of a drawing.

    `kind`: "ellipse" or "box", given by two corners; "pie", the upper half of an ellipse; "polygon"; or "line".
    `paint`: "main", "dark", "light" or "ink".
    """

    kind: str
    paint: str
    points: tuple[Point, ...]


def ellipse(paint: str, x: float, y: float, rx: float, ry: float | None = None) -> Stroke:
    ry = rx if ry is None else ry
    return Stroke("ellipse", paint, ((x - rx, y - ry), (x + rx, y + ry)))


def box(paint: str, left: float, top: float, right: float, bottom: float) -> Stroke:
    return Stroke("box", paint, ((left, top), (right, bottom)))


def polygon(paint: str, *points: Point) -> Stroke:
    return Stroke("polygon", paint, points)


def line(paint: str, *points: Point) -> Stroke:
    return Stroke("line", paint, points)


def around(count: int, radius: float, start: float = 0.0) -> list[Point]:
    """`count` evenly spaced points on a circle, clockwise; the first is at the angle `start` (in radians) from the top."""
    angles = [start + 2 * np.pi * k / count for k in range(count)]
    return [(float(radius * np.sin(a)), float(-radius * np.cos(a))) for a in angles]


def heart() -> tuple[Point, ...]:
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    x, y = np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return tuple((float(a), float(b)) for a, b in zip(x, y, strict=True))


def gear() -> tuple[Point, ...]:
    corners = around(16, 1.0, 0.1)
    return tuple((x * r, y * r) for (x, y), r in zip(corners, [1.0, 1.0, 0.72, 0.72] * 4, strict=True))


def _blend(color: RGB, target: int, amount: float) -> RGB:
    r, g, b = (round(c + (target - c) * amount) for c in color)
    return r, g, b


def _paints(fill: RGB) -> dict[str, RGB]:
    is_dark = sum(fill) < 200
    return {
        "main": fill,
        "dark": _blend(fill, 255 if is_dark else 0, 0.35),
        "light": _blend(fill, 255, 0.75),
        "ink": (110, 110, 110) if is_dark else (25, 25, 25),
    }


def draw_strokes(
    pen: ImageDraw.ImageDraw,
    strokes: Sequence[Stroke],
    to_pixels: Callable[[Point], Point],
    half: float,
    fill: RGB,
    outlined: bool,
) -> None:
    """Draw `strokes` with the main colour `fill`.

    `to_pixels` maps their coordinates to the picture; `half` is half the extent of the object, in pixels.
    """
    paints = _paints(fill)
    outline = (10, 10, 10) if outlined else None
    width = max(1, round(half * 0.09))
    for stroke in strokes:
        points, paint = [to_pixels(point) for point in stroke.points], paints[stroke.paint]
        if stroke.kind == "line":
            pen.line(points, fill=paint, width=max(2, round(half * 0.2)), joint="curve")
        elif stroke.kind == "polygon":
            pen.polygon(points, fill=paint, outline=outline, width=width)
        else:
            (left, top), (right, bottom) = points
            corners = (min(left, right), top, max(left, right), bottom)
            if stroke.kind == "pie":
                pen.pieslice(corners, 180, 360, fill=paint, outline=outline, width=width)
            else:
                draw = pen.ellipse if stroke.kind == "ellipse" else pen.rectangle
                draw(corners, fill=paint, outline=outline, width=width)
