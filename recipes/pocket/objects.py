"""Simple drawings of everyday objects, each a few ellipses, polygons and lines in one main colour.

They were written for this recipe, stroke by stroke; no drawing of any emoji set was traced or looked at.
"""

from __future__ import annotations

from recipes.pocket.strokes import Stroke, around, box, ellipse, gear, heart, line, polygon

OBJECTS: dict[str, tuple[Stroke, ...]] = {
    "house": (
        box("main", -0.75, -0.1, 0.75, 1),
        polygon("dark", (-1, -0.1), (0, -1), (1, -0.1)),
        box("light", -0.2, 0.4, 0.2, 1),
    ),
    "tree": (box("ink", -0.15, 0.2, 0.15, 1), ellipse("main", 0, -0.3, 0.75, 0.7)),
    "car": (
        polygon("main", (-1, 0.5), (-1, 0), (-0.6, -0.05), (-0.35, -0.5), (0.4, -0.5), (0.65, -0.05), (1, 0), (1, 0.5)),
        box("light", -0.25, -0.35, 0.3, -0.05),
        ellipse("ink", -0.55, 0.5, 0.26),
        ellipse("ink", 0.55, 0.5, 0.26),
    ),
    "boat": (
        polygon("dark", (-1, 0.3), (1, 0.3), (0.6, 0.9), (-0.6, 0.9)),
        line("ink", (0, 0.3), (0, -1)),
        polygon("main", (0.1, -0.95), (0.85, 0.15), (0.1, 0.15)),
    ),
    "fish": (
        polygon("dark", (0.4, 0), (1, -0.6), (1, 0.6)),
        ellipse("main", -0.2, 0, 0.8, 0.5),
        ellipse("ink", -0.6, -0.12, 0.1),
    ),
    "bird": (
        ellipse("main", -0.1, 0.1, 0.7, 0.5),
        ellipse("main", 0.5, -0.45, 0.35),
        polygon("dark", (0.8, -0.55), (1, -0.4), (0.8, -0.3)),
        polygon("dark", (-0.4, 0), (0.3, 0), (-0.2, 0.5)),
        ellipse("ink", 0.55, -0.5, 0.08),
        line("ink", (0, 0.6), (0, 1)),
    ),
    "cat": (
        polygon("dark", (-0.8, -0.1), (-0.75, -1), (-0.1, -0.6)),
        polygon("dark", (0.8, -0.1), (0.75, -1), (0.1, -0.6)),
        ellipse("main", 0, 0.15, 0.85, 0.8),
        ellipse("ink", -0.35, 0, 0.12),
        ellipse("ink", 0.35, 0, 0.12),
        polygon("light", (-0.12, 0.35), (0.12, 0.35), (0, 0.5)),
    ),
    "bear": (
        ellipse("dark", -0.65, -0.6, 0.33),
        ellipse("dark", 0.65, -0.6, 0.33),
        ellipse("main", 0, 0.15, 0.85, 0.8),
        ellipse("light", 0, 0.45, 0.4, 0.32),
        ellipse("ink", -0.35, -0.1, 0.1),
        ellipse("ink", 0.35, -0.1, 0.1),
        ellipse("ink", 0, 0.35, 0.12, 0.09),
    ),
    "face": (
        ellipse("main", 0, 0, 1),
        ellipse("ink", -0.35, -0.25, 0.12, 0.16),
        ellipse("ink", 0.35, -0.25, 0.12, 0.16),
        line("ink", (-0.5, 0.3), (-0.25, 0.55), (0.25, 0.55), (0.5, 0.3)),
    ),
    "person": (
        ellipse("light", 0, -0.65, 0.33),
        polygon("main", (-0.55, 1), (-0.45, -0.2), (0.45, -0.2), (0.55, 1)),
        line("dark", (-0.45, -0.1), (-0.85, 0.5)),
        line("dark", (0.45, -0.1), (0.85, 0.5)),
    ),
    "hand": (
        box("main", -0.5, -0.1, 0.45, 1),
        box("main", -0.5, -0.85, -0.3, 0),
        box("main", -0.22, -1, -0.02, 0),
        box("main", 0.05, -0.9, 0.25, 0),
        box("main", 0.3, -0.6, 0.48, 0),
        polygon("dark", (0.45, 0.6), (0.95, 0), (0.8, -0.15), (0.45, 0.2)),
    ),
    "eye": (
        polygon("light", (-1, 0), (-0.4, -0.5), (0.4, -0.5), (1, 0), (0.4, 0.5), (-0.4, 0.5)),
        ellipse("main", 0, 0, 0.42),
        ellipse("ink", 0, 0, 0.18),
    ),
    "flower": (
        line("ink", (0, 0), (0, 1)),
        *[ellipse("main", x, y - 0.3, 0.32) for x, y in around(5, 0.42)],
        ellipse("light", 0, -0.3, 0.22),
    ),
    "leaf": (
        polygon("main", (0, -1), (0.6, -0.4), (0.5, 0.4), (0, 0.8), (-0.5, 0.4), (-0.6, -0.4)),
        line("dark", (0, -0.7), (0, 1)),
    ),
    "mushroom": (
        box("light", -0.28, 0, 0.28, 0.95),
        Stroke("pie", "main", ((-1, -0.9), (1, 1.0))),
        ellipse("light", -0.35, -0.35, 0.16),
        ellipse("light", 0.3, -0.4, 0.18),
    ),
    "sun": (*[line("main", (0, 0), p) for p in around(8, 1.0)], ellipse("main", 0, 0, 0.55)),
    "moon": (
        polygon("main", *[(0.8 * x, y) for x, y in around(20, 1.0)[10:]], (-0.1, -1), (-0.25, -0.5), (-0.25, 0.5), (-0.1, 1)),
    ),
    "cloud": (
        ellipse("main", -0.45, 0.15, 0.5, 0.4),
        ellipse("main", 0.45, 0.15, 0.52, 0.4),
        ellipse("main", 0, -0.15, 0.5),
    ),
    "apple": (
        ellipse("main", -0.3, 0.2, 0.55, 0.72),
        ellipse("main", 0.3, 0.2, 0.55, 0.72),
        line("ink", (0, -0.4), (0.12, -1)),
        ellipse("dark", 0.4, -0.75, 0.28, 0.15),
    ),
    "cherry": (
        line("ink", (-0.45, 0.4), (0.2, -0.9), (0.5, 0.4)),
        ellipse("main", -0.5, 0.5, 0.42),
        ellipse("main", 0.5, 0.5, 0.42),
    ),
    "cup": (
        ellipse("dark", 0.62, 0.1, 0.36, 0.4),
        ellipse("light", 0.62, 0.1, 0.18, 0.22),
        polygon("main", (-0.8, -0.6), (0.6, -0.6), (0.45, 0.8), (-0.65, 0.8)),
    ),
    "bottle": (
        box("dark", -0.17, -1, 0.17, -0.35),
        box("main", -0.42, -0.35, 0.42, 1),
        box("light", -0.42, 0.05, 0.42, 0.55),
    ),
    "cake": (
        box("main", -0.9, 0, 0.9, 0.9),
        box("light", -0.9, -0.1, 0.9, 0.2),
        line("ink", (0, -0.1), (0, -0.65)),
        ellipse("dark", 0, -0.8, 0.13, 0.2),
    ),
    "key": (
        ellipse("main", -0.55, 0, 0.43),
        ellipse("light", -0.55, 0, 0.18),
        box("main", -0.2, -0.1, 1, 0.12),
        box("main", 0.75, 0, 0.95, 0.45),
        box("main", 0.45, 0, 0.6, 0.4),
    ),
    "book": (
        polygon("main", (-1, -0.6), (0, -0.4), (1, -0.6), (1, 0.6), (0, 0.8), (-1, 0.6)),
        line("ink", (0, -0.4), (0, 0.8)),
    ),
    "clock": (
        ellipse("main", 0, 0, 1),
        ellipse("light", 0, 0, 0.78),
        line("ink", (0, 0.05), (0, -0.6)),
        line("ink", (0, 0), (0.42, 0.2)),
    ),
    "lamp": (
        polygon("main", (-0.45, -0.9), (0.45, -0.9), (0.85, 0.1), (-0.85, 0.1)),
        line("ink", (0, 0.1), (0, 0.9)),
        box("dark", -0.5, 0.8, 0.5, 1),
    ),
    "gift": (
        box("main", -0.85, -0.3, 0.85, 0.95),
        box("light", -0.16, -0.3, 0.16, 0.95),
        ellipse("dark", -0.32, -0.55, 0.3, 0.22),
        ellipse("dark", 0.32, -0.55, 0.3, 0.22),
    ),
    "umbrella": (Stroke("pie", "main", ((-1, -0.9), (1, 0.9))), line("ink", (0, 0), (0, 0.9), (0.3, 0.9))),
    "hat": (box("main", -0.5, -0.8, 0.5, 0.45), box("dark", -1, 0.4, 1, 0.65), box("light", -0.5, 0.1, 0.5, 0.3)),
    "shirt": (
        polygon(
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
        polygon("main", (-0.25, -0.8), (0.25, -0.8), (0.55, 0.2), (0.9, 0.55), (-0.9, 0.55), (-0.55, 0.2)),
        ellipse("dark", 0, 0.7, 0.2),
    ),
    "ball": (ellipse("main", 0, 0, 1), line("light", (-0.95, 0), (0.95, 0)), line("light", (0, -0.95), (0, 0.95))),
    "flag": (line("ink", (-0.8, -1), (-0.8, 1)), polygon("main", (-0.75, -0.9), (0.95, -0.75), (0.95, 0.25), (-0.75, 0.1))),
    "banner": (box("main", -1, -0.65, 1, 0.65), box("light", -1, -0.22, 1, 0.22)),
    "arrow": (polygon("main", (-1, -0.25), (0.1, -0.25), (0.1, -0.7), (1, 0), (0.1, 0.7), (0.1, 0.25), (-1, 0.25)),),
    "heart": (polygon("main", *heart()),),
    "ring": (ellipse("main", 0, 0, 1), ellipse("light", 0, 0, 0.55)),
    "gear": (polygon("main", *gear()), ellipse("light", 0, 0, 0.3)),
    "rocket": (
        polygon("dark", (-0.75, 0.85), (-0.3, 0.1), (0.3, 0.1), (0.75, 0.85)),
        polygon("main", (0, -1), (0.4, -0.4), (0.35, 0.75), (-0.35, 0.75), (-0.4, -0.4)),
        ellipse("light", 0, -0.2, 0.18),
    ),
    "train": (
        box("main", -0.75, -0.9, 0.75, 0.7),
        box("light", -0.55, -0.65, 0.55, -0.1),
        ellipse("ink", -0.45, 0.8, 0.2),
        ellipse("ink", 0.45, 0.8, 0.2),
    ),
    "ladder": (
        line("main", (-0.45, -1), (-0.45, 1)),
        line("main", (0.45, -1), (0.45, 1)),
        *[line("main", (-0.45, y), (0.45, y)) for y in (-0.7, -0.25, 0.2, 0.65)],
    ),
}
"""Name → strokes, in the order in which they are drawn."""
