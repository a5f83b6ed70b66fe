"""The manifest as one HTML page with two bar charts, without scripts or external files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fedmllm.data.manifest import Manifest
from fedmllm.data.samples import Sample
from fedmllm.data.schedule import Schedule
from fedmllm.errors import xml_text

_MODALITY_COLORS = {"both": "#4c72b0", "image": "#dd8452", "text": "#55a868", "neither": "#bbbbbb"}
_PALETTE = (
    "#8172b3", "#64b5cd", "#da8bc3", "#ccb974", "#937860", "#8c8c8c", "#c44e52", "#2f4b7c", "#a05195", "#dd8452",
    "#4c72b0", "#55a868",
)  # fmt: skip
_NAMED_COLORS = {
    "black": "#1a1a1a", "blue": "#2a52be", "brown": "#7b4a1e", "gray": "#808080", "green": "#2e8b2e", "grey": "#808181",
    "orange": "#ff8c00", "pink": "#ff69b4", "purple": "#6a1b9a", "red": "#c62828", "teal": "#008080", "white": "#ffffff",
    "yellow": "#f2c500",
}  # fmt: skip
"""A label that is the name of a colour gets that colour: a bar for "blue" must not be orange."""
_OTHER = "#dddddd"
_MAX_LABELS = len(_PALETTE)
_MAX_CLIENTS = 500
_ROW_HEIGHT, _LABEL_WIDTH, _LONGEST_BAR = 22, 84, 74
"""In pixels, in pixels, and in percent of the page, which may have any width."""
_STYLE = """:root{color-scheme:light dark}
body{font:14px sans-serif;margin:2em auto;padding:0 1em;max-width:820px}
svg{width:100%;overflow:visible;display:block}
text{font-size:12px;fill:currentColor}
rect{stroke:gray;stroke-width:.5}
.legend span{margin-right:1em;display:inline-block}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.3em;border:.5px solid gray}"""


def _pattern(visible: frozenset[str]) -> str:
    return "both" if len(visible) == 2 else next(iter(visible), "neither")


def _bars(title: str, rows: Sequence[Counter[str]], colors: Mapping[str, str]) -> str:
    largest = max((sum(row.values()) for row in rows), default=1) or 1
    used = {name: color for name, color in colors.items() if any(row[name] for row in rows)}
    parts = [f"<h2>{xml_text(title)}</h2>", '<p class="legend">']
    parts += [f'<span><i style="background:{color}"></i>{xml_text(name)}</span>' for name, color in used.items()]
    parts.append(f'</p><svg height="{_ROW_HEIGHT * len(rows) + 8}" role="img" aria-label="{xml_text(title)}">')
    for index, row in enumerate(rows):
        y, x = index * _ROW_HEIGHT + 4, 0.0
        label = f'<text x="{_LABEL_WIDTH - 8}" y="{y + 13}" text-anchor="end">client {index}</text>'
        parts.append(f'{label}<g transform="translate({_LABEL_WIDTH})">')
        for name, color in used.items():
            if row[name]:
                width = row[name] / largest * _LONGEST_BAR
                tooltip = f"client {index}, {name}: {row[name]} samples"
                box = f'x="{x:.3f}%" y="{y}" width="{width:.3f}%" height="{_ROW_HEIGHT - 5}" fill="{color}"'
                parts.append(f"<rect {box}><title>{xml_text(tooltip)}</title></rect>")
                x += width
        parts.append(f'<text x="{x:.3f}%" dx="6" y="{y + 13}">{sum(row.values())}</text></g>')
    return "".join([*parts, "</svg>"])


def _timeline(schedule: Schedule, clients: int) -> str:
    """One bar a client over the rounds, coloured by what the client may see."""
    parts = ["<h2>What each client may see, round by round</h2>", '<p class="legend">']
    parts += [f'<span><i style="background:{color}"></i>{xml_text(name)}</span>' for name, color in _MODALITY_COLORS.items()]
    parts.append(f'</p><svg height="{_ROW_HEIGHT * clients + 24}" role="img" aria-label="Modalities of the clients by round">')
    for client in range(clients):
        y = client * _ROW_HEIGHT + 4
        label = f'<text x="{_LABEL_WIDTH - 8}" y="{y + 13}" text-anchor="end">client {client}</text>'
        parts.append(f'{label}<g transform="translate({_LABEL_WIDTH})">')
        for start, length in _stretches(schedule, client):
            name = _pattern(schedule.visible(client, start))
            x, width = (_LONGEST_BAR * rounds / schedule.rounds for rounds in (start, length))
            box = f'x="{x:.3f}%" y="{y}" width="{width:.3f}%" height="{_ROW_HEIGHT - 5}" fill="{_MODALITY_COLORS[name]}"'
            rounds = f"rounds {start} to {start + length - 1}" if length > 1 else f"round {start}"
            parts.append(f"<rect {box}><title>{xml_text(f'client {client}, {rounds}: {name}')}</title></rect>")
        parts.append("</g>")
    bottom = clients * _ROW_HEIGHT + 16
    for x, anchor, label in ((0, "start", "first round"), (_LONGEST_BAR, "end", f"{schedule.rounds} rounds")):
        text = f'<text x="{x}%" y="{bottom}" text-anchor="{anchor}">{label}</text>'
        parts.append(f'<g transform="translate({_LABEL_WIDTH})">{text}</g>')
    return "".join([*parts, "</svg>"])


def _stretches(schedule: Schedule, client: int) -> list[tuple[int, int]]:
    """(first round, number of rounds) of each stretch in which this client does not change."""
    starts = sorted({0, *(change.round for change in schedule.changes if change.client == client)})
    return [(start, end - start) for start, end in zip(starts, [*starts[1:], schedule.rounds], strict=True)]


def _colors(labels: Sequence[str]) -> dict[str, str]:
    palette = iter(_PALETTE)
    return {label: _NAMED_COLORS[label.lower()] if label.lower() in _NAMED_COLORS else next(palette) for label in labels}


def draw_manifest(manifest: Manifest, samples: Sequence[Sample], title: str) -> str:
    """HTML that shows for each client which modalities are visible and which labels its samples have."""
    labels = {s.id: s.label for s in samples}
    common = [name for name, _ in Counter(labels.values()).most_common(_MAX_LABELS)]
    by_pattern: list[Counter[str]] = [Counter() for _ in range(manifest.clients)]
    by_label: list[Counter[str]] = [Counter() for _ in range(manifest.clients)]
    for holding in manifest:
        by_pattern[holding.client][_pattern(holding.visible)] += 1
        label = labels[holding.sample_id]
        by_label[holding.client][label if label in common else "other"] += 1
    label_colors = {**_colors(sorted(common)), "other": _OTHER}
    note = f"; the first {_MAX_CLIENTS} are drawn" if manifest.clients > _MAX_CLIENTS else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{xml_text(title)}</title><style>{_STYLE}</style><h1>{xml_text(title)}</h1>"
        f"<p>{len(manifest)} samples on {manifest.clients} clients{note}; manifest {manifest.digest()[:12]}</p>"
        + _bars("What each client sees: samples by modality", by_pattern[:_MAX_CLIENTS], _MODALITY_COLORS)
        + (_timeline(manifest.schedule, min(manifest.clients, _MAX_CLIENTS)) if manifest.schedule.changes else "")
        + _bars("What each client holds: samples by label", by_label[:_MAX_CLIENTS], label_colors)
        + "</html>\n"
    )
