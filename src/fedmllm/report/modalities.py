"""Which modalities the clients' samples show, as drawn and as expected: the effective rates behind a grid's settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmllm.report.page import Page
from fedmllm.report.scores import UNKNOWN, mean
from fedmllm.report.sections import Chapter
from fedmllm.storage.run_dir import RunDir

_PATTERNS = {"both": "both", "image": "image only", "text": "text only", "none": "neither"}


def add_modalities(page: Page, chapter: Chapter) -> None:
    """The shares of training samples by the modalities that they show. Cells with equal shares are one row, named by the axes
    on which they are not all. Runs of versions that did not record the shares are left out."""
    places: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in chapter.grid.rows:
        # The samples of a centralised run show everything, and nobody trains on those of a zero-shot run.
        results = [RunDir(chapter.folder / run).result() for run in row.ids if row.kind in ("federated", "local")]
        if shares := [result["modalities"] for result in results if "modalities" in result]:
            places.setdefault(_cells(shares), []).append(row.axes)
    if not places:
        return
    page.heading(
        3,
        "What the clients see",
        "The share of the training samples that show both modalities, one or neither, in percent: the mean over the runs as "
        "drawn, and in brackets what the scenario gives over all draws.",
    )
    everything = _values([axes for group in places.values() for axes in group])
    table = []
    for cells, group in places.items():
        values = _values(group)
        named = [", ".join(values[axis]) for axis in values if values[axis] != everything[axis]]
        table.append([" · ".join(named) or "all", *cells])
    page.table(["clients of", *_PATTERNS.values()], table)


def _values(cells: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """axis -> its values in these cells."""
    return {axis: list(dict.fromkeys(axes[axis] for axes in cells)) for axis in cells[0]}


def _cells(shares: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """ "49.3 (49.0)" for each pattern."""
    cells = []
    for pattern in _PATTERNS:
        drawn = mean([s["drawn"][pattern] for s in shares])
        expected = mean([s["expected"][pattern] if s["expected"] else None for s in shares])
        cells.append(f"{_percent(drawn)} ({_percent(expected)})")
    return tuple(cells)


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f}"
