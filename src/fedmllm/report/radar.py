"""A radar chart of a grid like the paper's first figure, in plain SVG: one axis per setting, one line per method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedmllm.errors import xml_text

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933", "#882255", "#44aa99")
"""Colours by Okabe and Ito, distinguishable with any colour vision, and a few by Tol."""
DASHES = ("", "7 3", "2 3")
"""Dash patterns: the colours are reused with the next one when the palette is used up."""
RADIUS, MARGIN = 190, 16
LETTER = 7.5
"""An upper estimate of the width of a letter at 13 pixels, since the width of a text is unknown before it is rendered."""
_LOW = 2.0
"""The least distance of the worst score from the centre, in points, so that no line shrinks to a dot."""


def scale(values: Sequence[float]) -> tuple[float, float]:
    """The percentages at the centre and at the outer ring: multiples of 10 around `values`, or a whole number of steps of 20
    apart if the range exceeds 50. Only scores near 0 lie in the centre."""
    low, high = max(0, math.floor((min(values) - _LOW) / 10) * 10), math.ceil(max(values) / 10) * 10
    high = max(high, low + 10)
    if high - low > 50 and (high - low) % 20:
        low, high = (low - 10, high) if low else (low, high + 10)
    return float(low), float(high)


def radar(title: str, axes: Sequence[str], lines: Mapping[str, Sequence[float | None]]) -> str:
    """An SVG of `lines`: method -> its score in percent on each axis, None if unknown.

    A line has a gap at an unknown score. The centre is the lowest ring, not 0; the scale is written along the first axis.
    Raises ValueError for fewer than three axes, or without any score.
    """
    known = [value for line in lines.values() for value in line if value is not None]
    if len(axes) < 3 or not known:
        raise ValueError("a radar chart needs three axes and a score")
    low, high = scale(known)
    label_width = MARGIN + LETTER * max(map(len, axes))
    centre_x, centre_y = RADIUS * 1.1 + label_width, RADIUS + 80.0
    legend = centre_x + RADIUS * 1.1 + label_width
    width = max(legend + 32 + LETTER * max(map(len, lines)), MARGIN + LETTER * len(title)) + MARGIN
    height = max(centre_y + RADIUS + 56, 72 + 22 * len(lines))

    def point(index: int, radius: float) -> tuple[float, float]:
        angle = 2 * math.pi * index / len(axes)
        return centre_x + RADIUS * radius * math.sin(angle), centre_y - RADIUS * radius * math.cos(angle)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)

    box = f'viewBox="0 0 {width:.0f} {height:.0f}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="13">',
        f"<title>{xml_text(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="26" font-size="15">{xml_text(title)}</text>',
    ]
    rings = range(int(low), int(high) + 1, 10 if high - low <= 50 else 20)
    for ring in rings:
        corners = path([point(i, (ring - low) / (high - low)) for i in range(len(axes))])
        parts.append(f'<polygon points="{corners}" fill="none" stroke="#ccc"/>')
    for index, name in enumerate(axes):
        x, y = point(index, 1)
        parts.append(f'<line x1="{centre_x:.1f}" y1="{centre_y:.1f}" x2="{x:.1f}" y2="{y:.1f}" stroke="#ccc"/>')
        x, y = point(index, 1.1)
        anchor = "middle" if abs(x - centre_x) < 20 else "start" if x > centre_x else "end"
        parts.append(f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{xml_text(name)}</text>')
    for number, (name, values) in enumerate(lines.items()):
        color = PALETTE[number % len(PALETTE)]
        dash = DASHES[number // len(PALETTE) % len(DASHES)]
        style = f'stroke="{color}" stroke-width="2" fill="none"' + (f' stroke-dasharray="{dash}"' if dash else "")
        spots = [None if v is None else point(i, (v - low) / (high - low)) for i, v in enumerate(values)]
        if all(spots):
            parts.append(f'<polygon points="{path([s for s in spots if s])}" {style}/>')
        else:
            for start, end in zip(spots, spots[1:] + spots[:1], strict=True):
                if start and end:
                    parts.append(f'<polyline points="{path([start, end])}" {style}/>')
        parts += [f'<circle cx="{s[0]:.1f}" cy="{s[1]:.1f}" r="2.5" fill="{color}"/>' for s in spots if s]
        y = 62 + 22 * number
        parts.append(f'<line x1="{legend:.1f}" y1="{y}" x2="{legend + 26:.1f}" y2="{y}" {style}/>')
        parts.append(f'<text x="{legend + 32:.1f}" y="{y + 4}">{xml_text(name)}</text>')
    halo = 'fill="#555" stroke="white" stroke-width="3" paint-order="stroke"'
    for ring in rings:  # drawn after the lines, so that the labels stay readable
        x, y = point(0, (ring - low) / (high - low))
        parts.append(f'<text x="{x + 5:.1f}" y="{y + 4:.1f}" font-size="11" {halo}>{ring}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
