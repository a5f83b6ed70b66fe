"""A forest plot in plain SVG: the effect behind each claim with its interval, and the margin of what does not matter."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from fedmllm.errors import xml_text
from fedmllm.report.radar import LETTER, MARGIN, PALETTE

COLOURS = {"supported": PALETTE[2], "refuted": PALETTE[1], "no effect": PALETTE[0], "undecided": "#555", "not run": "#999"}
LINE, GAP, PLOT, TOP = 17, 7, 360, 74
"""The height of a row, the space between claims, the width of the plotting area, and the space above it, in pixels."""
_WRAP = 38  # letters on a line of a claim's name
_LEGEND = "dot: estimate, hollow if the verdict does not survive Holm's correction; line: 95 % interval; band: the margin ±d"


class Effect(NamedTuple):
    """A row: what is claimed and where; the estimate, its interval and the margin in points, NaN if unknown. `verdict` is one
    of COLOURS; `firm` says that it holds after the correction for the number of claims."""

    claim: str
    where: str
    estimate: float
    low: float
    high: float
    margin: float
    verdict: str
    firm: bool


class _Scale(NamedTuple):
    left: float
    bound: int
    """The points at the right end of the scale, and less than zero at the left one."""

    def x(self, points: float) -> float:
        return self.left + PLOT * (min(max(points / self.bound, -1), 1) + 1) / 2


def forest(title: str, effects: Sequence[Effect]) -> str:
    """An SVG of effects, those of one claim next to each other. An interval that leaves the scale ends in an arrow.

    Raises ValueError without any effect.
    """
    if not effects:
        raise ValueError("a forest plot needs an effect")
    known = [abs(effect.estimate) for effect in effects if math.isfinite(effect.estimate)]
    left = 2 * MARGIN + LETTER * (_WRAP + max(len(effect.where) for effect in effects))
    scale = _Scale(left, 10 * math.ceil(max([*known, 1.0]) / 10))
    rows, bottom = list[str](), float(TOP)
    for claim, of_claim in groupby(effects, key=lambda effect: effect.claim):
        drawn = [_row(effect, bottom + LINE * (number + 0.5), scale) for number, effect in enumerate(of_claim)]
        names = [_text(MARGIN, bottom + LINE * (i + 0.75), line) for i, line in enumerate(textwrap.wrap(claim, _WRAP))]
        rows += [*names, *drawn]
        bottom += LINE * max(len(drawn), len(names)) + GAP
    width, zero = left + PLOT + LETTER * max(map(len, COLOURS)) + 2 * MARGIN, scale.x(0)
    axis = [f'<line x1="{zero:.1f}" y1="{TOP}" x2="{zero:.1f}" y2="{bottom:.0f}" stroke="#333"/>']
    step = 10 if scale.bound <= 50 else 50
    for tick in range(-scale.bound // step * step + step * (scale.bound % step > 0), scale.bound + 1, step):
        axis += [_text(scale.x(tick), y, f"{tick:+d}" if tick else "0", anchor="middle") for y in (TOP - 6, bottom + 14)]
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {bottom + 48:.0f}" font-family="sans-serif" '
        'font-size="13">',
        f"<title>{xml_text(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="26" font-size="15">{xml_text(title)}</text>',
        _text(zero - 20, TOP - 26, "← against the claim", anchor="end"),
        _text(zero + 20, TOP - 26, "for the claim, points →"),
    ]
    return "\n".join([*head, *axis, *rows, _text(MARGIN, bottom + 38, _LEGEND), "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, colour: str = "#333", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{xml_text(text)}</text>'


def _row(effect: Effect, y: float, scale: _Scale) -> str:
    """The elements of one effect, whose middle is at the height y."""
    colour, bound, x = COLOURS[effect.verdict], scale.bound, scale.x
    band = x(-effect.margin), x(effect.margin) - x(-effect.margin)
    parts = [
        _text(scale.left - MARGIN, y + 4, effect.where, "#555", "end"),
        f'<rect x="{band[0]:.1f}" y="{y - LINE / 2:.1f}" width="{band[1]:.1f}" height="{LINE}" fill="#ddd"/>',
        _text(scale.left + PLOT + MARGIN, y + 4, effect.verdict, colour),
    ]
    if math.isfinite(effect.low):
        low, high = x(effect.low), x(effect.high)
        parts.append(f'<line x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        ends = [(low, 6, effect.low < -bound), (high, -6, effect.high > bound)]
        arrows = [f"{at:.1f},{y} {at + back:.1f},{y - 4} {at + back:.1f},{y + 4}" for at, back, beyond in ends if beyond]
        parts += [f'<polygon points="{arrow}" fill="{colour}"/>' for arrow in arrows]
    if math.isfinite(effect.estimate):
        fill = colour if effect.firm else "white"
        parts.append(f'<circle cx="{x(effect.estimate):.1f}" cy="{y}" r="4" fill="{fill}" stroke="{colour}" stroke-width="2"/>')
    return "\n".join(parts)
