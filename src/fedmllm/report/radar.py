"""The picture of a grid in the manner of the paper's first figure: an axis a setting, a line a method. Plain SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933", "#882255", "#44aa99")
"""Okabe and Ito's colours, which people with any colour vision can tell apart, and a few of Tol's."""
DASHES = ("", "7 3", "2 3")
"""A second round through the palette is dashed."""
WIDTH, HEIGHT, RADIUS = 760, 520, 190


def scale(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and highest ring: multiples of 10 around `values`, in percent, at least 10 apart."""
    low, high = math.floor(min(values) / 10) * 10, math.ceil(max(values) / 10) * 10
    return float(low), float(max(high, low + 10))


def radar(title: str, axes: Sequence[str], lines: Mapping[str, Sequence[float | None]]) -> str:
    """An SVG of `lines`: method -> a score in percent for each axis, None where there is none.

    A line has a gap beside a missing score. The centre is the lowest ring, not 0: the scale is written along the first axis.
    Raises ValueError with fewer than three axes, or no score at all.
    """
    known = [value for line in lines.values() for value in line if value is not None]
    if len(axes) < 3 or not known:
        raise ValueError("a radar needs three axes and a score")
    low, high = scale(known)
    centre_x, centre_y = HEIGHT / 2, HEIGHT / 2

    def point(index: int, reach: float) -> tuple[float, float]:
        angle = 2 * math.pi * index / len(axes)
        return centre_x + RADIUS * reach * math.sin(angle), centre_y - RADIUS * reach * math.cos(angle)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="12" y="20" font-size="14">{escape(title)}</text>',
    ]
    step = 10 if high - low <= 50 else 20
    for ring in range(int(low), int(high) + 1, step):
        reach = (ring - low) / (high - low)
        corners = path([point(i, reach) for i in range(len(axes))])
        parts.append(f'<polygon points="{corners}" fill="none" stroke="#ddd"/>')
        x, y = point(0, reach)
        parts.append(f'<text x="{x + 3:.1f}" y="{y - 2:.1f}" fill="#777" font-size="10">{ring}</text>')
    for index, name in enumerate(axes):
        x, y = point(index, 1)
        parts.append(f'<line x1="{centre_x:.1f}" y1="{centre_y:.1f}" x2="{x:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        x, y = point(index, 1.1)
        anchor = "middle" if abs(x - centre_x) < 20 else "start" if x > centre_x else "end"
        parts.append(f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    for number, (name, values) in enumerate(lines.items()):
        color = PALETTE[number % len(PALETTE)]
        dash = DASHES[number // len(PALETTE) % len(DASHES)]
        style = f'stroke="{color}" stroke-width="2" fill="none"' + (f' stroke-dasharray="{dash}"' if dash else "")
        spots = [None if v is None else point(i, (v - low) / (high - low)) for i, v in enumerate(values)]
        if all(spots):
            parts.append(f'<polygon points="{path([s for s in spots if s])}" {style}/>')
        else:
            for here, there in zip(spots, spots[1:] + spots[:1], strict=True):
                if here and there:
                    parts.append(f'<polyline points="{path([here, there])}" {style}/>')
        parts += [f'<circle cx="{s[0]:.1f}" cy="{s[1]:.1f}" r="2.5" fill="{color}"/>' for s in spots if s]
        y = 60 + 20 * number
        parts.append(f'<line x1="{HEIGHT + 50}" y1="{y}" x2="{HEIGHT + 76}" y2="{y}" {style}/>')
        parts.append(f'<text x="{HEIGHT + 82}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
