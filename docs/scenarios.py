"""Draw the pictures of scenarios.md, docs/figures/scenario-*.svg, from manifests of pocket-memes.

    make tables        # runs this too; the same as `python docs/scenarios.py`

A row is a client, and a cell a sample that it holds, or a round if what clients see changes; the upper half of a cell is the
image, the lower half the text. The pictures have no background, and colours that are legible on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmllm.config import validate
from fedmllm.data.dealing import draw
from fedmllm.data.manifest import Manifest
from fedmllm.data.partitions import partitions
from fedmllm.data.samples import MODALITIES, Sample
from fedmllm.data.tasks import tasks
from fedmllm.errors import xml_text
from fedmllm.experiment.parts import build_scenario

FIGURES = Path(__file__).parent / "figures"
CLIENTS, SAMPLES, ROUNDS, SEED = 8, 20, 20, 1
"""`SAMPLES` is the number that each client holds."""
SCENARIOS: dict[str, dict[str, Any]] = {
    "aligned": {"name": "aligned"},
    "missing": {"name": "missing"},
    "cross": {"name": "cross"},
    "hybrid": {"name": "hybrid"},
    "graded": {"name": "graded"},
    "label-dependent": {"name": "label-dependent", "slope": 0.6, "modality": "image"},
    "paired-few": {"name": "paired-few"},
    "drift": {"name": "drift"},
    "drift-markov": {"name": "drift", "how": "markov", "modality": "either"},
    "noisy": {"name": "noisy"},
    "hybrid-missing-noisy": {"name": "hybrid", "then": [{"name": "missing", "rate": 0.2}, {"name": "noisy"}]},
    "paired-few-drift": {"name": "paired-few", "then": [{"name": "drift", "how": "markov", "modality": "either"}]},
}
"""name of the picture -> its table [scenario]."""
COLORS = {"image": "#dd8452", "text": "#55a868"}
"""As on the page that `fedmllm partition --plot` writes."""
WORDS = "#7a7a7a"
LEFT, TOP, CELL, HALF, STEP, ROW = 68, 24, 16, 7, 20, 20
"""In pixels: the first cell's place, a cell's width, the height of half of it, and the distances of cells and of rows."""
LETTER = 8
"""At most the mean width of a letter, in pixels."""
LOOKS = {
    **{m: f'fill="{color}"' for m, color in COLORS.items()},
    **{f"bad {m}": f'fill="url(#bad-{m})" stroke="{color}" stroke-width=".8"' for m, color in COLORS.items()},
    "missing": f'fill="none" stroke="{WORDS}" stroke-opacity=".6" stroke-width=".8"',
}
"""How half a cell is drawn."""
LEGEND = ("image", "text", "missing", "bad image", "bad text")
Cell = tuple[str, str]
"""The looks of the upper and of the lower half."""


def load_samples() -> list[Sample]:
    return [s for s in tasks.build("pocket-memes", {"n": CLIENTS * SAMPLES}).load("train") if isinstance(s, Sample)]


def drawn(table: Mapping[str, Any], samples: Sequence[Sample]) -> Manifest:
    scenario = build_scenario(validate({"task": {"name": "pocket-memes"}, "scenario": table}).scenario)
    return draw(samples, partitions.build("iid", {}), scenario, CLIENTS, 1, SEED, ROUNDS)


def sample_cells(manifest: Manifest, client: int, samples: Mapping[str, Sample], label: str | None) -> list[Cell]:
    """A cell for each sample of the client, only for those with this label if one is given."""
    cells = []
    for holding in manifest.of_client(client):
        if label in (None, samples[holding.sample_id].label):
            bad = {modality for modality, _, _ in holding.noise}
            looks = [m if m in holding.visible else "missing" for m in MODALITIES]
            upper, lower = (f"bad {look}" if look in bad else look for look in looks)
            cells.append((upper, lower))
    return cells


def round_cells(manifest: Manifest, client: int) -> list[Cell]:
    """A cell for each round: which modalities the client sees of any of its samples."""
    counts = [manifest.at(number).counts()[client, 1:].tolist() for number in range(ROUNDS)]
    return [("image" if images else "missing", "text" if texts else "missing") for images, texts in counts]


def grid(cells: Sequence[Sequence[Cell]], left: int) -> Iterable[tuple[str, str]]:
    """(look, path) of every half of a cell; a row a client."""
    for row, of_client in enumerate(cells):
        for column, halves in enumerate(of_client):
            for half, look in enumerate(halves):
                x, y = left + column * STEP, TOP + row * ROW + half * (HALF + 1)
                yield look, f"M{x} {y}h{CELL}v{HALF}h-{CELL}z"


def picture(name: str, samples: Sequence[Sample]) -> str:
    """The SVG called `name`. Raises KeyError if there is none."""
    manifest, by_id = drawn(SCENARIOS[name], samples), {sample.id: sample for sample in samples}
    clients = range(CLIENTS)
    if manifest.schedule.changes:
        panels = {f"what a client sees in rounds 0 to {ROUNDS - 1}": [round_cells(manifest, client) for client in clients]}
    elif name == "label-dependent":
        panels = {
            f"samples answered “{label}”": [sample_cells(manifest, client, by_id, label) for client in clients]
            for label in sorted({sample.label for sample in samples})
        }
    else:
        panels = {"what a client sees of its samples": [sample_cells(manifest, client, by_id, None) for client in clients]}
    paths: dict[str, list[str]] = {look: [] for look in LOOKS}
    left, words = LEFT, [(LEFT - 8, TOP + ROW * c + 12, "end", f"client {c}") for c in clients]
    for title, cells in panels.items():
        words.append((left, TOP - 9, "start", title))
        for look, path in grid(cells, left):
            paths[look].append(path)
        left += max(max(map(len, cells)) * STEP, LETTER * len(title)) + 12
    x, bottom = LEFT, TOP + ROW * CLIENTS
    for look in [look for look in LEGEND if paths[look]]:
        paths[look].append(f"M{x} {bottom + 8}h{CELL}v{HALF}h-{CELL}z")
        words.append((x + CELL + 5, bottom + 16, "start", look))
        x += CELL + LETTER * len(look) + 14
    title = " + ".join(part["name"] for part in (SCENARIOS[name], *SCENARIOS[name].get("then", ())))
    return svg(max(left, x), bottom + 26, f"{title}: {' and '.join(panels)}", paths, words)


def svg(
    width: int, height: int, title: str, paths: Mapping[str, Sequence[str]], words: Iterable[tuple[int, int, str, str]]
) -> str:
    stripes = "".join(
        f'<pattern id="bad-{m}" width="4" height="4" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="1.6" height="4" fill="{color}"/></pattern>'
        for m, color in COLORS.items()
        if paths[f"bad {m}"]
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="sans-serif" font-size="13" fill="{WORDS}">',
        f"<title>{xml_text(title)}</title>",
        *([f"<defs>{stripes}</defs>"] if stripes else []),
        *(f'<path {LOOKS[look]} d="{"".join(path)}"/>' for look, path in paths.items() if path),
        *(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{xml_text(word)}</text>' for x, y, anchor, word in words),
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    samples = load_samples()
    for name in SCENARIOS:
        path, content = FIGURES / f"scenario-{name}.svg", picture(name, samples)
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            print(f"{path.name}: drawn again")


if __name__ == "__main__":
    main()
