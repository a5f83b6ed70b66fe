"""Runs and sweeps as one page of HTML. The same folders give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fedmllm.report.clients import add_clients, add_curves, add_holdings, client_table, expected_scores, tenths
from fedmllm.report.comparisons import runs_against
from fedmllm.report.curves import Line, curves
from fedmllm.report.gallery import add_gallery
from fedmllm.report.grids import grid_of, reading
from fedmllm.report.html_page import HtmlPage
from fedmllm.report.hypotheses import add_hypotheses
from fedmllm.report.kept import add_kept
from fedmllm.report.modalities import add_modalities
from fedmllm.report.page import Markdown
from fedmllm.report.protocol import compare
from fedmllm.report.sections import Chapter, add_transfer
from fedmllm.report.sentences import untested
from fedmllm.report.suites import add_suites
from fedmllm.report.tables import comparison, metrics_table
from fedmllm.report.units import tested_on
from fedmllm.report.writeup import add_sweeps, read_chapters
from fedmllm.storage.archive import INDEX
from fedmllm.storage.run_dir import RunDir

_RUNS = "Single runs"
_INTRODUCTION = (
    "Written by `fedmllm report` from run folders alone. Scores are in percent. Of sweeps, they are means ± s.d. over "
    "replicates or seeds (no ± if there is only one; * where not all of them are complete); of single runs, they have 95 % "
    "intervals over the test samples."
)


def html_report(
    folders: Sequence[Path],
    baseline: str | None = None,
    open_samples: bool = False,
    hypotheses: Path | None = None,
    title: str | None = None,
) -> str:
    """The answers to a file of hypotheses, a chapter for all single runs, and one per sweep.

    `baseline` is a cell of the sweeps, or the path of one of the runs. With `open_samples`, the gallery opens the data that the
    runs name; nothing else does. The title names the runs and sweeps unless it is given. Raises RunError if a folder is neither
    a run's nor a sweep's.
    """
    page = HtmlPage()
    page.paragraph(Markdown(_INTRODUCTION))
    runs = {name: RunDir(folder) for name, folder in _named([f for f in folders if not (f / INDEX).is_file()]).items()}
    chapters = read_chapters([folder for folder in folders if (folder / INDEX).is_file()])
    if hypotheses:
        add_hypotheses(page, hypotheses, chapters)
    if runs:
        _add_runs(page, runs, baseline, open_samples)

    def more(chapter: Chapter) -> None:
        with reading(chapter.folder):
            add_curves(page, chapter)
            add_clients(page, chapter)
            add_holdings(page, chapter)
            add_gallery(page, _first_runs(chapter), open_samples)

    add_sweeps(page, chapters, baseline, more)
    names = [*runs, *(chapter.grid.name for chapter in chapters)]
    return page.html(title or f"Report: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}")


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Each folder by its name, or by its path where several have one name."""
    names = [folder.resolve().name for folder in folders]
    return {n if names.count(n) == 1 else str(folder): folder for n, folder in zip(names, folders, strict=True)}


def _first_runs(chapter: Chapter) -> dict[str, RunDir]:
    """The methods' first runs at the first setting that has any."""
    for column in chapter.columns:
        rows = {" · ".join(name): rows[column] for name, rows in chapter.methods.items() if column in rows}
        if runs := {name: RunDir(chapter.folder / row.ids[0]) for name, row in rows.items() if row.ids}:
            return runs
    return {}


def _add_runs(page: HtmlPage, runs: dict[str, RunDir], baseline: str | None, open_samples: bool) -> None:
    results = {name: run.result() for name, run in runs.items()}
    page.heading(2, _RUNS)
    with reading(" or ".join(str(run.path) for run in runs.values())):
        _add_table(page, comparison(list(results.values())), list(runs))
        _add_differences(page, runs, results, baseline)
        for name, result in results.items():
            if len(result["metrics"]):
                page.heading(3, f"Scores of {name}")
                _add_table(page, metrics_table(result["metrics"], ""))
        _add_rounds(page, runs, results)
        cells = [
            {"axes": {"run": name}, "seed": result["seed"], "kind": result["kind"], "id": str(runs[name].path.resolve())}
            for name, result in results.items()
        ]
        chapter = Chapter(Path(), grid_of(Path(), {"name": "runs", "axes": ["run"], "cells": cells}))
        add_modalities(page, chapter)
        for name, result in results.items():
            if result["per_client"]:
                page.heading(3, f"Clients of {name}")
                client_table(page, result)
        add_kept(page, chapter)
        add_transfer(page, chapter)
        add_suites(page, chapter, None)
        add_gallery(page, runs, open_samples)


def _add_table(page: HtmlPage, table: Table, names: Sequence[str] = ()) -> None:
    """A table of the terminal; `names` come before its rows."""
    rows: list[list[str]] = [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]
    head = [str(column.header) for column in table.columns]
    if table.title:
        page.paragraph(str(table.title))
    if names:
        head, rows = ["folder", *head], [[name, *row] for name, row in zip(names, rows, strict=True)]
    page.table(head, rows, 2 if names else 1)


def _add_differences(page: HtmlPage, runs: dict[str, RunDir], results: dict[str, Any], baseline: str | None) -> None:
    """What the protocol says of single runs: one replicate has no interval."""
    chosen = next((name for name, run in runs.items() if baseline in (name, str(run.path))), next(iter(runs)))
    keys = {n: (tested_on(run, results[n].get("test_digest", "")), results[n]["primary_metric"]) for n, run in runs.items()}
    same = {name: run for name, run in runs.items() if keys[name] == keys[chosen]}
    if len(same) < 2 or not results[chosen]["metrics"]:
        return
    gaps = runs_against([run.path for run in same.values()], runs[chosen].path)
    names = {run.path: name for name, run in same.items()}
    page.paragraph(f"Against {chosen}, on the same test samples:")
    page.items([untested(compare({"": {"": gap}}, {"": {"": 0.0}}), names[path], chosen) for path, gap in gaps.items()])


def _add_rounds(page: HtmlPage, runs: dict[str, RunDir], results: dict[str, Any]) -> None:
    """The scores of each run over the rounds under each pattern, those of the worst and best tenth of its clients, and the
    loss in percent of that of the first round."""
    places: dict[str, dict[str, dict[str, Line]]] = {}
    for name, run in runs.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        losses, metric = [], results[name]["primary_metric"]
        for record in run.rounds():
            at = record["round"] + 1.0
            losses.append((at, float(record.get("loss") or math.nan)))
            metrics = record.get("metrics") or {}
            scores = {pattern: values[metric] for pattern, values in metrics.items()}
            if clients := expected_scores(results[name], metrics) if metrics else []:
                parts = tenths(clients)
                scores |= (
                    {"worst tenth of clients": parts[0], "best tenth of clients": parts[-1]} if parts[0] < parts[-1] else {}
                )
            for label, score in scores.items():
                if not (math.isnan(score) or 0 <= score <= 1):
                    raise ValueError(f"the score {score} is not between 0 and 1")
                if not math.isnan(score):
                    lines.setdefault(label, []).append((at, 100 * score))
        panels: dict[str, dict[str, Line]] = {"rounds": dict(lines)} if any(len(line) > 1 for line in lines.values()) else {}
        first = losses[0][1] if losses else math.nan
        if len(losses) > 1 and first > 0 and all(0 <= loss <= 2 * first for _, loss in losses):
            panels["rounds, training loss"] = {"loss, % of the first round's": [(x, 100 * loss / first) for x, loss in losses]}
        if panels:
            places[name] = panels
    if places:
        page.heading(3, "Round by round")
        title = "score and training loss by round, %"
        page.picture(f"{title}; the numbers are in rounds.jsonl", "", curves(title, places))
