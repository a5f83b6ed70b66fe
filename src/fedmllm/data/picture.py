"""The manifest as a picture: one page of HTML with two bar charts, no script and nothing to download."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from fedmllm.data.manifest import Manifest
from fedmllm.data.samples import Sample

_SEEN = (("both", "#4c72b0"), ("image", "#dd8452"), ("text", "#55a868"), ("neither", "#bbbbbb"))
_PALETTE = (
    "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd",
    "#2f4b7c", "#a05195",
)  # fmt: skip
_MOST_LABELS = len(_PALETTE)
_ROW, _LEFT, _WIDTH = 22, 90, 640


def _seen(visible: frozenset[str]) -> str:
    return "both" if len(visible) == 2 else next(iter(visible), "neither")


def _bars(title: str, rows: Sequence[Counter[str]], colors: dict[str, str]) -> str:
    longest = max((sum(row.values()) for row in rows), default=1) or 1
    parts = [f"<h2>{escape(title)}</h2>", '<p class="legend">']
    parts += [f'<span><i style="background:{color}"></i>{escape(name)}</span>' for name, color in colors.items()]
    height = _ROW * len(rows) + 8
    parts.append(f'</p><svg viewBox="0 0 {_LEFT + _WIDTH + 60} {height}" role="img" aria-label="{escape(title)}">')
    for index, row in enumerate(rows):
        y, x = index * _ROW + 4, float(_LEFT)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">client {index}</text>')
        for name, color in colors.items():
            if row[name]:
                width = row[name] / longest * _WIDTH
                tip = f"client {index}, {name}: {row[name]} samples"
                box = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_ROW - 5}" fill="{color}"'
                parts.append(f"<rect {box}><title>{escape(tip)}</title></rect>")
                x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 13}">{sum(row.values())}</text>')
    return "".join([*parts, "</svg>"])


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
    by_label = dict(zip(sorted(common), _PALETTE, strict=False))
    if any(row["other"] for row in named):
        by_label["other"] = "#dddddd"
    style = (
        "body{font:14px sans-serif;margin:2em auto;max-width:820px;color:#222}svg{width:100%}text{font-size:12px}"
        ".legend span{margin-right:1em;white-space:nowrap}"
        ".legend i{display:inline-block;width:.8em;height:.8em;margin-right:.3em}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
        f"<h1>{escape(title)}</h1><p>{len(manifest)} samples on {manifest.clients} clients; "
        f"manifest {manifest.digest()[:12]}</p>"
        + _bars("What each client sees", seen, dict(_SEEN))
        + _bars("Which labels each client holds", named, by_label)
        + "</html>\n"
    )
