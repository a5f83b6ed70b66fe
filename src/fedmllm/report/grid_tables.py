"""Grids as tables in the terminal, in the layout of the paper: methods down, heterogeneity across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fedmllm.report.grids import Grid, row_score, unit_name
from fedmllm.report.scores import UNKNOWN, score


def grid_table(grid: Grid) -> Table:
    """The first axis across, the others down, and published scores below the first row of each algorithm."""
    across, downs = grid.axes[0] if grid.axes else "", grid.axes[1:]
    columns = list(dict.fromkeys(row.axes.get(across, "") for row in grid.rows))
    metric = next((row.metric for row in grid.rows if row.metric), "no run is complete")
    title = f"{grid.name}: {metric}, %, mean ± s.d. over replicates or seeds; * not all are complete"
    table = Table(title=title, title_justify="left", caption=grid.source if grid.published else None)
    for axis in downs or [""]:
        table.add_column(axis)
    for column in columns:
        table.add_column(column or grid.name, justify="right")
    figures = {(p.algorithm, p.cell): p for p in grid.published}
    shown: set[str] = set()
    for name, cells in grid.cells(downs, across).items():
        table.add_row(*(name or ("",)), *(row_score(cells.get(column)) for column in columns))
        algorithm = next((row.algorithm for row in cells.values() if row.kind == "federated" and row.algorithm), "")
        scores = [figures.get((algorithm, column)) for column in columns] if algorithm not in shown else []
        if any(scores):
            shown.add(algorithm)
            label = f"  {algorithm}, published ({next(p.metric for p in scores if p)})"
            blank = [""] * (max(len(name), 1) - 1)
            table.add_row(label, *blank, *(f"{p.percent:.1f}" if p else UNKNOWN for p in scores), style="dim italic")
    return table


def pattern_table(grid: Grid) -> Table:
    """One row per cell: its score under each test pattern and for the worst tenth of clients."""
    order = [*grid.axes[1:], *grid.axes[:1]]  # the cells of a method are neighbours
    patterns = list(dict.fromkeys(name for row in grid.rows for name in row.patterns))
    table = Table(title=f"{grid.name}: trained in × tested with, %, mean ± s.d. over replicates or seeds", title_justify="left")
    for axis in order:
        table.add_column(axis)
    for name in (*patterns, "worst tenth of clients"):
        table.add_column(name, justify="right")
    positions = {axis: list(dict.fromkeys(row.axes[axis] for row in grid.rows)) for axis in order}
    for row in sorted(grid.rows, key=lambda row: [positions[axis].index(row.axes[axis]) for axis in order]):
        spreads = (*(row.patterns.get(name) for name in patterns), row.worst_decile)
        table.add_row(*(row.axes[axis] for axis in order), *(score(spread, row.missing) for spread in spreads))
    return table


def cells_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The output of `sweep --dry-run`: every cell with its run and that run's state; `rows` are lines of the index."""
    runs = {row["id"] for row in rows}
    table = Table(title=f"{len(rows)} cells, {len(runs)} distinct runs", title_justify="left")
    for column in (*(rows[0]["axes"] if rows else ()), "seed or replicate", "run", "state"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row["axes"].values(), unit_name(row), row["id"], row["state"])
    return table
