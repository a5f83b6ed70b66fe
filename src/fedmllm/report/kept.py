"""What robust aggregation kept of the clients' updates: does it mistake honest clients with one modality for attackers?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from fedmllm.evaluation.clients import MODALITY_GROUPS, modality_group
from fedmllm.report.comparisons import interval
from fedmllm.report.grids import GridRow, reading
from fedmllm.report.page import Page
from fedmllm.report.protocol import compare
from fedmllm.report.scores import UNKNOWN
from fedmllm.report.sections import Chapter
from fedmllm.storage.run_dir import RunDir

GROUPS = ("attackers", *MODALITY_GROUPS)
"""The attackers, and the honest clients by the modalities that their samples show."""
TRIMMED = 0.5
"""An update of which less is kept counts as trimmed."""
Shares = Mapping[str, list[float]]
"""group -> the share kept of each update of its clients."""


def add_kept(page: Page, chapter: Chapter) -> None:
    """The share of the updates that each cell kept, by group of clients; nothing if no run chose among updates."""
    rows = [(row, _kept(chapter, row)) for row in chapter.grid.rows if row.kind == "federated"]
    seen = {group for _, by_unit in rows for shares in by_unit.values() for group in shares}
    if not seen:
        return
    groups = [group for group in GROUPS if group in seen]
    compared = [group for group in groups if group not in ("attackers", "paired")]
    table = [[*row.axes.values(), *_cells(by_unit, groups, compared)] for row, by_unit in rows if by_unit]
    page.heading(
        3,
        "Whose updates are kept",
        "How much of an update robust aggregation kept, in percent of its weight in the plain mean: averaged over the rounds "
        "and clients of a run, then over replicates. In brackets, how many updates were trimmed, of which less than half was "
        "kept. Honest clients are grouped by the modalities that their samples show. The last columns compare them with those "
        "whose samples all show both, in points with a 95 % interval over the replicates that have both groups.",
    )
    differences = [f"{group} − paired" for group in compared]
    page.table([*chapter.grid.axes, *groups, *differences], table, len(chapter.grid.axes))


def trimmed_more(chapter: Chapter, row: GridRow) -> dict[str, float]:
    """unit -> how much more of the updates of paired clients was kept than of those with one modality, all of them honest, as a
    share of 1; NaN for a unit without one of the two groups."""
    gaps = {}
    for unit, shares in _kept(chapter, row).items():
        paired, single = shares.get("paired", []), [*shares.get("image only", []), *shares.get("text only", [])]
        gaps[unit] = fmean(paired) - fmean(single) if paired and single else math.nan
    return gaps


def _kept(chapter: Chapter, row: GridRow) -> dict[str, Shares]:
    """unit -> the shares that its run kept, for the runs that recorded any."""
    by_unit = {}
    for unit, name in row.units.items():
        run = RunDir(chapter.folder / name)
        with reading(run.path):
            by_unit[unit] = _kept_of(run)
    return {unit: shares for unit, shares in by_unit.items() if shares}


def _kept_of(run: RunDir) -> Shares:
    kept = [item for record in run.rounds() for item in record.get("kept", {}).items()]
    rows = run.result()["per_client"] if kept else []
    groups = {str(row["client"]): "attackers" if row.get("attacker") else modality_group(row) for row in rows}
    shares: dict[str, list[float]] = {}
    for client, share in kept:
        shares.setdefault(groups[client], []).append(float(share))
    return shares


def _cells(by_unit: Mapping[str, Shares], groups: Sequence[str], compared: Sequence[str]) -> list[str]:
    means = {group: {unit: fmean(shares[group]) for unit, shares in by_unit.items() if group in shares} for group in GROUPS}
    cells = []
    for group in groups:
        every = [share for shares in by_unit.values() for share in shares.get(group, ())]
        trimmed = sum(share < TRIMMED for share in every)
        cells.append(f"{100 * fmean(means[group].values()):.0f} ({trimmed} of {len(every)})" if every else UNKNOWN)
    for group in compared:
        difference = compare({"": means[group]}, {"": means["paired"]})
        cells.append(UNKNOWN if math.isnan(difference.estimate) else interval(difference))
    return cells
