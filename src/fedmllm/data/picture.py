"""The manifest as a picture: one page of HTML with two bar charts, no script and nothing to download."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from fedmllm.data.manifest import Manifest
from fedmllm.data.samples import Sample

_SEEN = {"both": "#4c72b0", "image": "#dd8452", "text": "#55a868", "neither": "#bbbbbb"}
_PALETTE = (
    "#8172b3", "#64b5cd", "#da8bc3", "#ccb974", "#937860", "#8c8c8c", "#c44e52", "#2f4b7c", "#a05195", "#dd8452",
    "#4c72b0", "#55a868",
)  # fmt: skip
_COLORS = {
    "black": "#1a1a1a", "blue": "#2a52be", "brown": "#7b4a1e", "gray": "#808080", "green": "#2e8b2e", "grey": "#808181",
    "orange": "#ff8c00", "pink": "#ff69b4", "purple": "#6a1b9a", "red": "#c62828", "teal": "#008080", "white": "#ffffff",
    "yellow": "#f2c500",
}  # fmt: skip
"""A label that names a colour has it: a bar of "blue" must not be orange."""
_OTHER = "#dddddd"
_MOST_LABELS = len(_PALETTE)
_MOST_CLIENTS = 500
_ROW, _LEFT, _REACH = 22, 84, 74
"""Pixels of a row and of the names beside the bars; percent of the page for the longest bar. The page may be of any width."""
_STYLE = """:root{color-scheme:light dark}
body{font:14px sans-serif;margin:2em auto;padding:0 1em;max-width:820px}
svg{width:100%;overflow:visible;display:block}
text{font-size:12px;fill:currentColor}
rect{stroke:gray;stroke-width:.5}
.legend span{margin-right:1em;display:inline-block}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.3em;border:.5px solid gray}"""


def _seen(visible: frozenset[str]) -> str:
    return "both" if len(visible) == 2 else next(iter(visible), "neither")


def _bars(title: str, rows: Sequence[Counter[str]], colors: Mapping[str, str]) -> str:
    longest = max((sum(row.values()) for row in rows), default=1) or 1
    found = {name: color for name, color in colors.items() if any(row[name] for row in rows)}
    parts = [f"<h2>{escape(title)}</h2>", '<p class="legend">']
    parts += [f'<span><i style="background:{color}"></i>{escape(name)}</span>' for name, color in found.items()]
    parts.append(f'</p><svg height="{_ROW * len(rows) + 8}" role="img" aria-label="{escape(title)}">')
    for index, row in enumerate(rows):
        y, x = index * _ROW + 4, 0.0
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">client {index}</text><g transform="translate({_LEFT})">'
        )
        for name, color in found.items():
            if row[name]:
                width = row[name] / longest * _REACH
                tip = f"client {index}, {name}: {row[name]} samples"
                box = f'x="{x:.3f}%" y="{y}" width="{width:.3f}%" height="{_ROW - 5}" fill="{color}"'
                parts.append(f"<rect {box}><title>{escape(tip)}</title></rect>")
                x += width
        parts.append(f'<text x="{x:.3f}%" dx="6" y="{y + 13}">{sum(row.values())}</text></g>')
    return "".join([*parts, "</svg>"])


def _colors(labels: Sequence[str]) -> dict[str, str]:
    rest = iter(_PALETTE)
    return {label: _COLORS[label.lower()] if label.lower() in _COLORS else next(rest) for label in labels}


def draw_manifest(manifest: Manifest, samples: Sequence[Sample], title: str) -> str:
    """HTML that shows, client by client, what is visible and which labels there are."""
    labels = {s.id: s.label for s in samples}
    common = [name for name, _ in Counter(labels.values()).most_common(_MOST_LABELS)]
    seen: list[Counter[str]] = [Counter() for _ in range(manifest.clients)]
    named: list[Counter[str]] = [Counter() for _ in range(manifest.clients)]
    for holding in manifest:
        seen[holding.client][_seen(holding.visible)] += 1
        label = labels[holding.sample_id]
        named[holding.client][label if label in common else "other"] += 1
    by_label = {**_colors(sorted(common)), "other": _OTHER}
    first = f"; the first {_MOST_CLIENTS} are drawn" if manifest.clients > _MOST_CLIENTS else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>"
        f"<p>{len(manifest)} samples on {manifest.clients} clients{first}; manifest {manifest.digest()[:12]}</p>"
        + _bars("What each client sees: samples by modality", seen[:_MOST_CLIENTS], _SEEN)
        + _bars("What each client holds: samples by label", named[:_MOST_CLIENTS], by_label)
        + "</html>\n"
    )
