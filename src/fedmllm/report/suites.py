"""What suites found: tables of one run for the terminal, and of a grid's cells for the page of results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.table import Table

from fedmllm.report.comparisons import axis_of, replicated
from fedmllm.report.curves import Line, curves
from fedmllm.report.grids import GridRow, reading
from fedmllm.report.page import Page
from fedmllm.report.protocol import compare, summary
from fedmllm.report.scores import UNKNOWN, Spread, score
from fedmllm.report.sections import Chapter
from fedmllm.report.sentences import points
from fedmllm.storage.run_dir import RunDir

KEY_FIGURES = {
    "adversarial": {
        "PGD, 4/255": ("pictures", "both, 4/255", "pgd"),
        "random, 4/255": ("pictures", "both, 4/255", "random"),
        "greedy, 2 edits": ("texts", "both, 2 edits", "greedy"),
        "random, 2 edits": ("texts", "both, 2 edits", "random"),
    },
    "attribution": {
        "image gain": ("gains", "image", "gain"),
        "text gain": ("gains", "text", "gain"),
        "Shapley image": ("shapley", "score", "shapley_image"),
        "Shapley text": ("shapley", "score", "shapley_text"),
    },
    "cross-modal": {
        "pairs right, same text": ("contrast", "same_text", "both_right"),
        "pairs right, same picture": ("contrast", "same_picture", "both_right"),
        "follows picture": ("contradiction", "all", "follows_picture"),
        "follows text": ("contradiction", "all", "follows_text"),
    },
    "corruption": {f"robustness, {pattern}": ("robustness", pattern, "robustness") for pattern in ("both", "image", "text")},
}
"""suite -> heading -> the table, row and column of a figure that is compared between cells; few, so that they fit in a row."""

_SEVERITIES = [f"severity_{severity}" for severity in range(1, 6)]


def suite_tables(suite: str, findings: Mapping[str, Any]) -> Iterator[Table]:
    """The tables of one suite and one run: shares in percent, counts as they are."""
    for name, rows in findings["tables"].items():
        columns = _columns([rows])
        if not columns:
            continue
        table = Table(title=f"{suite}: {name}, %", title_justify="left")
        table.add_column("")
        for column in columns:
            table.add_column(_words(column), justify="right")
        for row, figures in rows.items():
            table.add_row(row, *(_figure([figures.get(column)]) for column in columns))
        yield table


Tables = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""table -> row -> column -> figure."""


def add_suites(page: Page, chapter: Chapter, baseline: str | None) -> None:
    """For every suite its key figures, with intervals, and its tables, with a row for each cell and each row of the suite's
    own: the mean over the cell's runs."""
    rows = [(row, {run: _findings(chapter, run) for run in row.ids}) for row in chapter.grid.rows]
    suites = dict.fromkeys(suite for _, runs in rows for findings in runs.values() for suite in findings)
    if not suites:
        return
    page.heading(
        3,
        "What the models use",
        "What suites found about the final models, in percent. Key figures are means over the replicates with 95 % intervals, "
        "which cover the test questions only as far as replicates have their own. The tables below them are means over the "
        "runs; counts are whole numbers.",
    )
    for suite in suites:
        cells = [(row, {run: found[suite] for run, found in runs.items() if suite in found}) for row, runs in rows]
        cells = [(row, runs) for row, runs in cells if runs]
        _add_key_figures(page, chapter, suite, cells, baseline)
        if suite == "corruption":
            _add_picture(page, chapter, cells)
        for name in dict.fromkeys(name for _, runs in cells for tables in runs.values() for name in tables):
            _add_table(page, f"{suite}: {name}", [(row, [t[name] for t in runs.values() if name in t]) for row, runs in cells])


def _add_picture(page: Page, chapter: Chapter, cells: Sequence[tuple[GridRow, Mapping[str, Tables]]]) -> None:
    """The score against the severity of the corruptions, from 0 (the plain test) to 5: a panel for each pattern."""
    panels: dict[str, dict[str, dict[str, Line]]] = {}  # pattern -> the one abscissa -> cell -> line
    for row, runs in cells:
        tables = [tables.get("robustness", {}) for tables in runs.values()]
        for pattern in dict.fromkeys(pattern for table in tables for pattern in table):
            means = [fmean(_number(t.get(pattern, {}).get(column)) for t in tables) for column in ("clean", *_SEVERITIES)]
            if not any(map(math.isnan, means)):
                panels.setdefault(pattern, {}).setdefault("severity", {})[" · ".join(row.axes.values())] = [
                    (float(severity), 100 * mean) for severity, mean in enumerate(means)
                ]
    if panels:
        name, title = chapter.grid.name, "score by severity of the corruption, %, the mean over kinds and runs"
        page.picture(f"{name}: {title}", f"figures/{name}-corruption.svg", curves(f"{name}: {title}", panels))


def _findings(chapter: Chapter, run: str) -> dict[str, Tables]:
    """suite -> its tables."""
    with reading(chapter.folder / run):
        found = RunDir(chapter.folder / run).result().get("suites") or {}
        return {
            suite: {name: {k: dict(figures) for k, figures in table.items()} for name, table in findings["tables"].items()}
            for suite, findings in found.items()
        }


def _add_table(page: Page, title: str, cells: Sequence[tuple[GridRow, Sequence[Mapping[str, Mapping[str, Any]]]]]) -> None:
    columns = _columns([table for _, tables in cells for table in tables])
    body = [
        [" · ".join(cell.axes.values()), row, *(_figure([t.get(row, {}).get(column) for t in tables]) for column in columns)]
        for cell, tables in cells
        for row in dict.fromkeys(row for table in tables for row in table)
    ]
    if body:
        page.paragraph(title)
        page.table(["cell", "", *map(_words, columns)], body, 2)


def _add_key_figures(
    page: Page, chapter: Chapter, suite: str, cells: Sequence[tuple[GridRow, Mapping[str, Tables]]], baseline: str | None
) -> None:
    """The suite's `KEY_FIGURES` of each cell, and how far they are above those of the baseline at the same place."""
    columns: dict[str, dict[tuple[str, ...], dict[str, float]]] = {}
    for heading, (name, key, column) in KEY_FIGURES.get(suite, {}).items():
        values = {
            tuple(row.axes.values()): {
                unit: _number(runs[run].get(name, {}).get(key, {}).get(column))
                for unit, run in row.units.items()
                if run in runs
            }
            for row, runs in cells
        }
        if any(not math.isnan(value) for units in values.values() for value in units.values()):
            columns[heading] = values
    if not columns:
        return
    axes, rows = chapter.grid.axes, [row for row, _ in cells]
    page.paragraph(f"{suite}: key figures")
    table: list[list[str]] = []
    for row in rows:
        # Replicates that share a run, as those of zero-shot do if they share their data, are one observation.
        distinct = {run: unit for unit, run in row.units.items()}
        of_cell = [by_cell[tuple(row.axes.values())] for by_cell in columns.values()]
        own = [{unit: units[unit] for unit in distinct.values() if unit in units} for units in of_cell]
        table.append([*row.axes.values(), *(replicated(summary({"": units}), _percent) for units in own)])
    page.table([*axes, *columns], table, len(axes))
    if baseline is None:
        return
    axis = axis_of(chapter.grid, baseline, chapter.folder)
    body: list[list[str]] = []
    for row in rows:
        ours, theirs = tuple(row.axes.values()), tuple({**row.axes, axis: baseline}.values())
        if ours != theirs and theirs in next(iter(columns.values())):
            differences = [compare({"": by_cell[ours]}, {"": by_cell[theirs]}) for by_cell in columns.values()]
            body.append([*ours, *map(replicated, differences)])
    if body:
        page.paragraph(f"{suite}: points above {baseline}, paired by replicate")
        page.table([*axes, *columns], body, len(axes))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _percent(share: float) -> str:
    return points(share, "")


def _columns(tables: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(column for table in tables for figures in table.values() for column in figures))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(values: Sequence[Any]) -> str:
    """The mean of the figures of several runs, in percent unless they are counts; a dash if one is unknown."""
    known = [value for value in values if isinstance(value, int | float) and not math.isnan(value)]
    if len(known) < len(values):
        return UNKNOWN
    if all(isinstance(value, int) for value in known):
        return f"{sum(known) / len(known):.0f}"
    return score(Spread.of(known))
