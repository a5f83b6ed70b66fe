"""What suites found: tables of one run for the terminal, and of a grid's cells for the page of results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from fedmllm.report.grids import reading
from fedmllm.report.page import Page
from fedmllm.report.scores import UNKNOWN, Spread, score
from fedmllm.report.sections import Chapter
from fedmllm.storage.run_dir import RunDir


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


def add_suites(page: Page, chapter: Chapter) -> None:
    """The tables of every suite, with a row for each cell and each row of the suite's own: the mean over the cell's runs."""
    found: dict[tuple[str, str], list[tuple[str, list[Mapping[str, Any]]]]] = {}
    for row in chapter.grid.rows:
        of_cell: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for run in row.ids:
            with reading(chapter.folder / run):
                for suite, findings in (RunDir(chapter.folder / run).result().get("suites") or {}).items():
                    for name, table in findings["tables"].items():
                        of_cell.setdefault((suite, name), []).append({k: dict(figures) for k, figures in table.items()})
        for key, tables in of_cell.items():
            found.setdefault(key, []).append((" · ".join(row.axes.values()), tables))
    if not found:
        return
    page.heading(
        3,
        "What the models use",
        "What suites found about the final models, in percent, the mean over the runs; counts are whole numbers.",
    )
    for (suite, name), cells in found.items():
        columns = _columns([table for _, tables in cells for table in tables])
        body = [
            [cell, row, *(_figure([table.get(row, {}).get(column) for table in tables]) for column in columns)]
            for cell, tables in cells
            for row in dict.fromkeys(row for table in tables for row in table)
        ]
        if body:
            page.paragraph(f"{suite}: {name}")
            page.table(["cell", "", *map(_words, columns)], body, 2)


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
