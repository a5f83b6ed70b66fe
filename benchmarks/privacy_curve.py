"""The score against ε: the table and the curve of a sweep such as experiments/studies/privacy.sweep.toml.

    python benchmarks/privacy_curve.py runs/study-privacy [--svg docs/figures/study-privacy.svg]

A cell is named "METHOD, ε = NUMBER", with ∞ for no noise; a cell of another name is a line across the
picture. A score is the mean over replicates with the 95 % interval of Student's t, which concerns other seeds and draws.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t

from fedmllm.errors import xml_text
from fedmllm.report.grids import read_grid
from fedmllm.report.radar import PALETTE, scale

Score = tuple[float, float]
"""Mean and half the width of the interval, in percent."""
WIDTH, HEIGHT, LEFT, TOP = 520, 300, 60, 50
NONE = "∞"


def score_of(values: Sequence[float]) -> Score:
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return 100 * fmean(values), 100 * half


def read_scores(folder: Path) -> dict[str, dict[str, Score]]:
    """method -> ε -> its score; ε is empty for a cell without one."""
    scores: dict[str, dict[str, Score]] = {}
    for row in read_grid(folder).rows:
        method, _, epsilon = next(iter(row.axes.values())).partition(", ε = ")
        if row.scores:
            scores.setdefault(method, {})[epsilon] = score_of(row.scores)
    return scores


def shown(score: Score | None) -> str:
    return "–" if score is None else f"{score[0]:.1f} [{score[0] - score[1]:.1f}, {score[0] + score[1]:.1f}]"


def table(scores: Mapping[str, Mapping[str, Score]]) -> str:
    epsilons = list(dict.fromkeys(epsilon for of_method in scores.values() for epsilon in of_method if epsilon))
    lines = [f"| method | {' | '.join(f'ε = {epsilon}' for epsilon in epsilons)} |", "|---|" + "---|" * len(epsilons)]
    for method, of_method in scores.items():
        cells = [shown(of_method.get("", of_method.get(epsilon))) for epsilon in epsilons]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curve(title: str, scores: Mapping[str, Mapping[str, Score]]) -> str:
    """An SVG: ε on a logarithmic axis with ∞ at its end, one line per method with its intervals."""
    epsilons = list(dict.fromkeys(epsilon for of_method in scores.values() for epsilon in of_method if epsilon))
    finite = [float(epsilon) for epsilon in epsilons if epsilon != NONE]
    ends = [value + sign * half for of in scores.values() for value, half in of.values() for sign in (-1, 1)]
    low, high = scale([end for end in ends if not math.isnan(end)])
    places = {f"{epsilon:g}": math.log10(epsilon) for epsilon in finite}
    places[NONE] = max(places.values(), default=0.0) + 0.5
    first, last = min(places.values()), max(places.values())

    def x(epsilon: str) -> float:
        return LEFT + WIDTH * (places[f"{float(epsilon):g}" if epsilon != NONE else NONE] - first) / (last - first)

    def y(value: float) -> float:
        return TOP + HEIGHT * (high - value) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 170} {TOP + HEIGHT + 60}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{xml_text(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="16" y="26" font-size="15">{xml_text(title)}</text>',
        f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 46}" text-anchor="middle">ε</text>',
    ]
    for mark in range(int(low), int(high) + 1, 10):
        parts.append(f'<line x1="{LEFT}" y1="{y(mark):.1f}" x2="{LEFT + WIDTH}" y2="{y(mark):.1f}" stroke="#ccc"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark}</text>')
    for epsilon in epsilons:
        parts.append(f'<text x="{x(epsilon):.1f}" y="{TOP + HEIGHT + 22}" text-anchor="middle">{xml_text(epsilon)}</text>')
    for number, (method, of_method) in enumerate(scores.items()):
        style = f'stroke="{PALETTE[number]}" stroke-width="2" fill="none"'
        if "" in of_method:
            level = y(of_method[""][0])
            parts.append(
                f'<line x1="{LEFT}" y1="{level:.1f}" x2="{LEFT + WIDTH}" y2="{level:.1f}" {style} stroke-dasharray="6 4"/>'
            )
        else:
            path = " ".join(f"{x(epsilon):.1f},{y(value):.1f}" for epsilon, (value, _) in of_method.items())
            parts.append(f'<polyline points="{path}" {style}/>')
            for epsilon, (value, half) in of_method.items():
                if not math.isnan(half):
                    at = x(epsilon) + 3 * (number - 1)  # beside each other, not over each other
                    parts.append(
                        f'<line x1="{at:.1f}" y1="{y(value - half):.1f}" x2="{at:.1f}" y2="{y(value + half):.1f}" {style}/>'
                    )
        parts.append(
            f'<text x="{LEFT + WIDTH + 24}" y="{TOP + 22 * number + 4}" fill="{PALETTE[number]}">{xml_text(method)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--svg", type=Path)
    arguments = parser.parse_args()
    scores = read_scores(arguments.folder)
    print(table(scores))
    if arguments.svg:
        grid = read_grid(arguments.folder)
        metric = next(row.metric for row in grid.rows if row.ids)
        arguments.svg.write_text(
            curve(f"{grid.name}: {metric}, %, with 95 % intervals over replicates", scores), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
