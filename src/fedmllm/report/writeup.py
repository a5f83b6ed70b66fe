"""The page of results: sweeps' folders in, Markdown and pictures out. The same folders give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedmllm.errors import RunError
from fedmllm.report.brief import HOW, add_brief
from fedmllm.report.comparisons import against, comparable
from fedmllm.report.convergence import add_speed
from fedmllm.report.grids import Grid, read_grid
from fedmllm.report.hypotheses import add_hypotheses
from fedmllm.report.kept import add_kept
from fedmllm.report.modalities import add_modalities
from fedmllm.report.page import Markdown, Page, anchor
from fedmllm.report.sections import (
    Chapter,
    add_baselines,
    add_comparisons,
    add_cost,
    add_patterns,
    add_scores,
    add_transfer,
)
from fedmllm.report.suites import add_suites
from fedmllm.storage.archive import INDEX

HEAD = """# {title}

Made by `fedmllm report` from run folders alone; do not edit. Scores are in percent, mean ± s.d. over replicates or seeds
(no ± if there is only one); \\* not all of them are complete. How methods are compared is in [statistics.md](statistics.md).
"""


def page(
    folders: Sequence[Path],
    baseline: str | None = None,
    hypotheses: Path | None = None,
    brief: bool = False,
    title: str | None = None,
) -> Page:
    """The answers to a file of hypotheses, and one chapter per sweep, in Markdown; if `brief`, each of one table. The title is
    "Results" unless it is given. Raises what `read_chapters` and `add_hypotheses` raise."""
    document, chapters = Page([Markdown(HEAD.rstrip()).filled(title=title or "Results")]), read_chapters(folders)
    if hypotheses:
        add_hypotheses(document, hypotheses, chapters)
    if brief:
        document.paragraph(HOW)
        for chapter in chapters:
            _add_brief(document, chapter, choose_baseline(chapter.grid, baseline))
    else:
        add_sweeps(document, chapters, baseline)
    document.lines.append("")
    return document


def read_chapters(folders: Sequence[Path]) -> list[Chapter]:
    """Raises RunError if a folder is not a sweep's or has no complete run, or if two share a name."""
    chapters: dict[str, Chapter] = {}
    for folder in folders:
        if not (folder / INDEX).is_file():
            raise RunError(f"{folder} is not a sweep's folder; give one that `fedmllm sweep` wrote.")
        grid = read_grid(folder)
        if grid.name in chapters:
            raise RunError(f"{folder}: another of the folders is also a sweep named {grid.name!r}; give only one of them.")
        if not grid.axes or not any(row.ids for row in grid.rows):
            raise RunError(f"{folder} has no axis, or no complete run; run the sweep first.")
        chapters[grid.name] = Chapter(folder, grid)
    return list(chapters.values())


def add_sweeps(
    document: Page, chapters: Sequence[Chapter], baseline: str | None, more: Callable[[Chapter], None] = lambda chapter: None
) -> None:
    """A section per sweep, with `more` at its end."""
    if len(chapters) > 1:
        line = Markdown("[{name}](#{anchor}): {extent}")
        grids = [chapter.grid for chapter in chapters]
        document.items([line.filled(name=g.name, anchor=anchor(g.name), extent=_extent(g)) for g in grids])
    for chapter in chapters:
        _add_chapter(document, chapter, choose_baseline(chapter.grid, baseline))
        more(chapter)


def _extent(grid: Grid) -> Markdown:
    extent = Markdown("{metrics} under the pattern `{pattern}`; {complete} of {cells} cells complete, {runs} runs")
    return extent.filled(**_figures(grid))


def _figures(grid: Grid) -> dict[str, object]:
    """What a chapter begins with."""
    known = [row for row in grid.rows if row.ids]
    metrics = " or ".join(dict.fromkeys(row.metric for row in known))
    complete, runs = sum(not row.missing for row in known), len({run for row in known for run in row.ids})
    return {"metrics": metrics, "pattern": known[0].pattern, "complete": complete, "cells": len(grid.rows), "runs": runs}


def _add_brief(document: Page, chapter: Chapter, baseline: str | None) -> None:
    corner = Markdown("{metrics}, pattern `{pattern}`, {runs} runs").filled(**_figures(chapter.grid))
    document.heading(2, chapter.grid.name)
    add_brief(document, chapter, corner, against(chapter.folder, chapter.grid, baseline, chapter.reader) if baseline else None)


def _add_chapter(document: Page, chapter: Chapter, baseline: str | None) -> None:
    grid = chapter.grid
    document.heading(2, grid.name, Markdown(f"{_extent(grid)}."))
    add_scores(document, chapter)
    add_modalities(document, chapter)
    add_baselines(document, chapter)
    if baseline is not None:
        add_comparisons(document, chapter, against(chapter.folder, grid, baseline, chapter.reader))
    add_kept(document, chapter)
    add_patterns(document, chapter)
    add_transfer(document, chapter)
    add_suites(document, chapter, baseline)
    add_cost(document, chapter)
    add_speed(document, chapter, baseline)
    if incomplete := [" · ".join(row.axes.values()) for row in grid.rows if row.missing]:
        names = "; ".join(incomplete[:5]) + ("; …" if len(incomplete) > 5 else "")
        document.paragraph(f"{len(incomplete)} cells lack runs: {names}.")


def choose_baseline(grid: Grid, requested: str | None) -> str | None:
    """The requested cell if this grid has it, else its zero-shot cell, else the first cell of its last axis of methods; None if
    every axis changes the data."""
    if requested is not None and any(requested in row.axes.values() for row in grid.rows):
        return requested
    untrained = [row.axes for row in grid.rows if row.kind == "zero-shot"]
    for axis in reversed(grid.axes) if untrained else ():
        if len({axes[axis] for axes in untrained}) == 1:
            return untrained[0][axis]
    methods = next((axis for axis in reversed(grid.axes) if comparable(grid, axis)), None)
    return grid.rows[0].axes[methods] if methods is not None else None
