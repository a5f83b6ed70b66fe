"""Scores against what they cost, in plain SVG: a row of panels for each place, a panel for each kind of cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedmllm.errors import xml_text
from fedmllm.report.radar import DASHES, LETTER, MARGIN, PALETTE, scale

Line = Sequence[tuple[float, float]]
"""Points (cost, score in percent), by cost."""
WIDTH, HEIGHT, GAP, TOP = 240, 170, 62, 70
"""The plotting area of a panel, the space around it, and the space above the first one."""


def mean_line(runs: Sequence[Line]) -> Line:
    """The mean score of several runs at every cost at which one of them was evaluated, from where all of them have a score.

    A run is interpolated between its evaluations, and keeps its last score after its end.
    """
    by_cost = [dict(run) for run in runs]  # of several evaluations at the same cost, the last one
    start = max(min(run) for run in by_cost)
    costs = sorted({cost for run in by_cost for cost in run if cost >= start})
    scores = np.mean([np.interp(costs, list(run), list(run.values())) for run in by_cost], axis=0)
    return list(zip(costs, scores.tolist(), strict=True))


def ticks(high: float) -> list[float]:
    """0 and the multiples of 1, 2 or 5 times a power of ten up to `high`, at most five of them."""
    power = 10.0 ** math.floor(math.log10(high / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if high <= 5 * power * factor * (1 + 1e-9))
    return [step * number for number in range(math.floor(high / step * (1 + 1e-9)) + 1)]


def curves(title: str, places: Mapping[str, Mapping[str, Mapping[str, Line]]]) -> str:
    """An SVG of place -> cost -> method -> line. All panels have one scale of scores, and a method has one colour in all.

    Raises ValueError without any point.
    """
    panels = [(row, column, place, cost, lines) for row, (place, costs) in enumerate(places.items())
              for column, (cost, lines) in enumerate(costs.items())]  # fmt: skip
    every = [score for *_, lines in panels for line in lines.values() for _, score in line]
    if not every:
        raise ValueError("curves need a point")
    low, high = scale(every)
    names = list(dict.fromkeys(name for *_, lines in panels for name in lines))
    styles = {name: _style(number) for number, name in enumerate(names)}
    legend = MARGIN + (max(column for _, column, *_ in panels) + 1) * (WIDTH + GAP) + 10
    width = max(legend + 32 + LETTER * max(map(len, names)), MARGIN + LETTER * len(title)) + MARGIN
    height = max(TOP + len(places) * (HEIGHT + GAP), TOP + 22 * len(names)) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="sans-serif" font-size="12">',
        f"<title>{xml_text(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="26" font-size="15">{xml_text(title)}</text>',
    ]
    for row, column, place, cost, lines in panels:
        left, top = MARGIN + 30 + column * (WIDTH + GAP), TOP + row * (HEIGHT + GAP)
        if place and not column:
            parts.append(f'<text x="{left}" y="{top - 10}">{xml_text(place)}</text>')
        parts += _panel(left, top, cost, (low, high), {styles[name]: line for name, line in lines.items()})
    for number, name in enumerate(names):
        y = TOP + 22 * number
        parts.append(f'<line x1="{legend}" y1="{y}" x2="{legend + 26}" y2="{y}" {styles[name]}/>')
        parts.append(f'<text x="{legend + 32}" y="{y + 4}">{xml_text(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _style(number: int) -> str:
    color, dash = PALETTE[number % len(PALETTE)], DASHES[number // len(PALETTE) % len(DASHES)]
    return f'stroke="{color}" stroke-width="1.5" fill="none"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _panel(left: int, top: int, cost: str, scores: tuple[float, float], lines: Mapping[str, Line]) -> list[str]:
    """The elements of one panel; `lines` are by style."""
    low, high = scores
    longest = max((x for line in lines.values() for x, _ in line), default=0.0) or 1.0
    bottom, parts = top + HEIGHT, []
    for score in range(int(low), int(high) + 1, 10 if high - low <= 50 else 20):
        y = bottom - HEIGHT * (score - low) / (high - low)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDTH}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" font-size="11">{score}</text>')
    for tick in ticks(longest):
        x = left + WIDTH * tick / longest
        parts.append(f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}" stroke="#888"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle" font-size="11">{tick:,g}</text>')
    parts.append(f'<text x="{left + WIDTH / 2:.0f}" y="{bottom + 34}" text-anchor="middle">{xml_text(cost)}</text>')
    for style, line in lines.items():
        spots = [(left + WIDTH * x / longest, bottom - HEIGHT * (score - low) / (high - low)) for x, score in line]
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in spots)}" {style}/>')
    return parts
