"""The manifest as one HTML page, without scripts or external files: charts, each with its numbers as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedmllm.data.differences import noise_rows
from fedmllm.data.manifest import Manifest
from fedmllm.data.samples import MODALITIES, Sample
from fedmllm.data.schedule import Schedule
from fedmllm.data.stored import Samples
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
_OTHER, _GOOD = "#dddddd", "#80808022"
_OPACITY = {"1": "55", "2": "77", "3": "99", "4": "cc"}
"""Of a severity, in hexadecimal; 5 is opaque."""
_MAX_LABELS = len(_PALETTE)
_MAX_CLIENTS = 500
_ROW_HEIGHT, _LABEL_WIDTH, _LONGEST_BAR = 22, 84, 74
"""In pixels, in pixels, and in percent of the page, which may have any width."""
_LONGEST_NAME = 12
"""In characters: as much as fits beside a bar."""
_STYLE = """:root{color-scheme:light dark}
body{font:14px sans-serif;margin:2em auto;padding:0 1em;max-width:820px}
svg{width:100%;overflow:visible;display:block}
text{font-size:12px;fill:currentColor}
rect{stroke:gray;stroke-width:.5}
line{stroke:gray;stroke-opacity:.5}
.legend span{margin-right:1em;display:inline-block}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.3em;border:.5px solid gray}
details{margin:.5em 0;overflow-x:auto}
table{border-collapse:collapse}
th,td{padding:.1em .6em;border-bottom:1px solid #8884;text-align:right;font-weight:normal}
@media print{body{max-width:none;margin:0;print-color-adjust:exact;-webkit-print-color-adjust:exact}
h2{break-after:avoid}tr{break-inside:avoid}details::details-content{content-visibility:visible;height:auto}}"""


class _Row(NamedTuple):
    """A line of a chart."""

    name: str
    drawing: str
    """SVG, from x = 0 on and 17 pixels high."""
    numbers: Sequence[object]
    """The same as cells of a table."""


def _pattern(visible: frozenset[str]) -> str:
    return "both" if len(visible) == 2 else next(iter(visible), "neither")


def _box(x: float, width: float, color: str, tooltip: str, y: int = 0, height: int = _ROW_HEIGHT - 5) -> str:
    """`x` and `width` are shares of the longest bar."""
    place = f'x="{x * _LONGEST_BAR:.3f}%" y="{y}" width="{width * _LONGEST_BAR:.3f}%" height="{height}"'
    return f'<rect {place} fill="{color}"><title>{xml_text(tooltip)}</title></rect>'


def _section(
    title: str, legend: Mapping[str, str], rows: Sequence[_Row], columns: Sequence[str], axis: Sequence[str] = ()
) -> str:
    """A chart with its legend (name -> colour), below it its numbers. `axis` labels the longest bar, from its beginning to its
    end at equal distances."""
    title = xml_text(title)
    parts = [f'<h2>{title}</h2><p class="legend">']
    parts += [f'<span><i style="background:{color}"></i>{xml_text(name)}</span>' for name, color in legend.items()]
    bottom = _ROW_HEIGHT * len(rows) + 4
    parts.append(f'</p><svg height="{bottom + (18 if axis else 4)}" role="img" aria-label="{title}; its numbers follow">')
    for index, row in enumerate(rows):
        y = index * _ROW_HEIGHT + 4
        name = row.name if len(row.name) <= _LONGEST_NAME else f"{row.name[: _LONGEST_NAME - 1]}…"
        parts.append(f'<text x="{_LABEL_WIDTH - 8}" y="{y + 13}" text-anchor="end">{xml_text(name)}</text>')
        parts.append(f'<g transform="translate({_LABEL_WIDTH} {y})">{row.drawing}</g>')
    for index, label in enumerate(axis):
        x, anchor = (
            _LONGEST_BAR * index / (len(axis) - 1),
            "start" if index == 0 else "end" if index == len(axis) - 1 else "middle",
        )
        mark = (
            f'<line x1="{x}%" x2="{x}%" y2="{bottom}"/><text x="{x}%" y="{bottom + 12}" text-anchor="{anchor}">{label}</text>'
        )
        parts.append(f'<g transform="translate({_LABEL_WIDTH})">{mark}</g>')
    parts.append(f"</svg><details><summary>the numbers: {title}</summary><table><thead><tr>")
    parts += [f'<th scope="col">{xml_text(column)}</th>' for column in ("", *columns)]
    parts.append("</tr></thead><tbody>")
    for row in rows:
        cells = "".join(f"<td>{xml_text(str(number))}</td>" for number in row.numbers)
        parts.append(f'<tr><th scope="row">{xml_text(row.name)}</th>{cells}</tr>')
    return "".join([*parts, "</tbody></table></details>"])


def _bars(title: str, rows: Mapping[str, Counter[str]], colors: Mapping[str, str]) -> str:
    """A bar a row, as long as its sum, in parts as long as its counts."""
    largest = max((row.total() for row in rows.values()), default=1) or 1
    used = {name: color for name, color in colors.items() if any(row[name] for row in rows.values())}
    drawn = []
    for label, row in rows.items():
        boxes, x = [], 0
        for name, color in used.items():
            if row[name]:
                boxes.append(_box(x / largest, row[name] / largest, color, f"{label}, {name}: {row[name]} samples"))
                x += row[name]
        boxes.append(f'<text x="{x / largest * _LONGEST_BAR:.3f}%" dx="6" y="13">{x}</text>')
        drawn.append(_Row(label, "".join(boxes), [*(row[name] for name in used), x]))
    return _section(title, used, drawn, [*used, "samples"])


def _losses(manifest: Manifest, samples: Sequence[Sample], clients: int) -> str:
    """Two bars a client: which share of the pictures and of the texts that its samples have it does not see."""
    stored = Samples.of(samples)
    order, lost = stored.places(manifest.ids), []
    for has, seen in ((stored.has_image, manifest.image), (stored.has_text, manifest.text)):
        had, kept = (np.bincount(manifest.owner[rows], minlength=manifest.clients) for rows in (has[order], seen))
        lost.append([None if not n else 1 - k / n for n, k in zip(had.tolist(), kept.tolist(), strict=True)])
    if not any(share for shares in lost for share in shares):
        return ""
    rows = []
    for client, rates in enumerate(zip(*lost, strict=True)):
        words = [f"{100 * rate:.1f} %" if rate is not None else "–" for rate in rates]
        boxes = [
            _box(0, rate or 0, _MODALITY_COLORS[m], f"client {client} misses {text} of its {m}s", y, 8)
            for m, rate, text, y in zip(MODALITIES, rates, words, (0, 9), strict=True)
        ]
        rows.append(_Row(f"client {client}", "".join(boxes), words))
    colors = {f"{m}s": _MODALITY_COLORS[m] for m in MODALITIES}
    title = "How much each client misses: the share of images and of texts"
    return _section(title, colors, rows[:clients], list(colors), ("0 %", "50 %", "100 %"))


def _noise(manifest: Manifest, clients: int) -> str:
    """For each modality of which something is corrupted, a bar a client: what is wrong with what it sees."""
    charts = []
    for (modality, kinds), seen in zip(noise_rows(manifest).items(), (manifest.image, manifest.text), strict=True):
        if kinds:
            counts = {name: np.bincount(manifest.owner[rows], minlength=manifest.clients) for name, rows in kinds.items()}
            counts = {"good": np.bincount(manifest.owner[seen], minlength=manifest.clients) - sum(counts.values()), **counts}
            rows = {
                f"client {client}": Counter({name: int(of_client[client]) for name, of_client in counts.items()})
                for client in range(clients)
            }
            palette = dict(zip(dict.fromkeys(name.rpartition(" ")[0] for name in kinds), _PALETTE * len(kinds), strict=False))
            colors = {"good": _GOOD}
            for name in kinds:
                kind, _, severity = name.rpartition(" ")
                colors[name] = palette[kind] + _OPACITY.get(severity, "")
            charts.append(_bars(f"How bad the {modality}s are that each client sees: by kind and severity", rows, colors))
    return "".join(charts)


def _timeline(schedule: Schedule, clients: int) -> str:
    """One bar a client over the rounds, coloured by what the client may see."""
    rows = []
    for client in range(clients):
        boxes, words = [], []
        for start, length, visible in schedule.stretches(client):
            name, rounds = _pattern(visible), f"rounds {start} to {start + length - 1}" if length > 1 else f"round {start}"
            words.append(f"{rounds}: {name}")
            x, width = start / schedule.rounds, length / schedule.rounds
            boxes.append(_box(x, width, _MODALITY_COLORS[name], f"client {client}, {rounds}: {name}"))
        rows.append(_Row(f"client {client}", "".join(boxes), ["; ".join(words)]))
    title = "What each client may see, round by round"
    return _section(title, _MODALITY_COLORS, rows, ["may see"], ("first round", f"{schedule.rounds} rounds"))


def _colors(labels: Sequence[str]) -> dict[str, str]:
    palette = iter(_PALETTE)
    return {label: _NAMED_COLORS[label.lower()] if label.lower() in _NAMED_COLORS else next(palette) for label in labels}


def draw_manifest(manifest: Manifest, samples: Sequence[Sample], title: str, notes: Iterable[str] = ()) -> str:
    """HTML that shows for each client which modalities are visible, how much it misses, what of it is corrupted, and which
    labels its samples have; for each class which modalities are visible; and what changes over the rounds. `notes` are
    sentences on it, such as those of `shares_lines`."""
    labels = {s.id: s.label for s in samples}
    common = [name for name, _ in Counter(labels.values()).most_common(_MAX_LABELS)]
    clients = min(manifest.clients, _MAX_CLIENTS)
    by_pattern: list[Counter[str]] = [Counter() for _ in range(manifest.clients)]
    by_label: list[Counter[str]] = [Counter() for _ in range(manifest.clients)]
    by_class: dict[str, Counter[str]] = {name: Counter() for name in (*sorted(common), "other")}
    for holding in manifest:
        label = labels[holding.sample_id]
        label, pattern = label if label in common else "other", _pattern(holding.visible)
        by_pattern[holding.client][pattern] += 1
        by_label[holding.client][label] += 1
        by_class[label][pattern] += 1
    classes = {name: counts for name, counts in by_class.items() if counts}
    differ = len(classes) > 1 and len(set().union(*classes.values())) > 1
    label_colors = {**_colors(sorted(common)), "other": _OTHER}
    note = f"; the first {_MAX_CLIENTS} are drawn" if manifest.clients > _MAX_CLIENTS else ""

    def of_clients(rows: Sequence[Counter[str]]) -> dict[str, Counter[str]]:
        return {f"client {client}": row for client, row in enumerate(rows[:clients])}

    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{xml_text(title)}</title><style>{_STYLE}</style><h1>{xml_text(title)}</h1>"
        f"<p>{len(manifest)} samples on {manifest.clients} clients{note}; manifest {manifest.digest()[:12]}</p>"
        + "".join(f"<p>{xml_text(line)}</p>" for line in notes)
        + _bars("What each client sees: samples by modality", of_clients(by_pattern), _MODALITY_COLORS)
        + _losses(manifest, samples, clients)
        + (_timeline(manifest.schedule, clients) if manifest.schedule.changes else "")
        + _noise(manifest, clients)
        + (_bars("What is seen of each class: samples by modality", classes, _MODALITY_COLORS) if differ else "")
        + _bars("What each client holds: samples by label", of_clients(by_label), label_colors)
        + "</html>\n"
    )
