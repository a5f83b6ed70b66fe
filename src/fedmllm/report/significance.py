"""Finished runs compared with a baseline: paired differences on the same test samples, with p corrected for multiple tests.

A cell of a grid is compared with the baseline's cell at the same place on the other axes. A second test, over the places, asks
whether the method is better in general.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.table import Table

from fedmllm.errors import RunError, suggest
from fedmllm.report.answers import AnswerCache, RunAnswers, read_answers
from fedmllm.report.grids import Grid
from fedmllm.report.paired_tests import Answered, Difference, holm, paired, sign_flip
from fedmllm.storage.run_dir import RunDir


@dataclass(frozen=True)
class Comparison:
    """A cell of a grid against the baseline's cell at the same place, or a run ({"run": directory}) against a baseline run.

    `p_holm` is p corrected over all comparisons.
    """

    axes: Mapping[str, str]
    difference: float
    ci: Sequence[float]
    p: float
    p_holm: float

    @classmethod
    def of(cls, axes: Mapping[str, str], test: Difference) -> Comparison:
        return cls(axes, test.difference, [test.low, test.high], test.p, test.p)

    def figures(self) -> dict[str, Any]:
        """The JSON object without the axes."""
        return {"difference": self.difference, "ci": self.ci, "p": self.p, "p_holm": self.p_holm}

    def to_json(self) -> dict[str, Any]:
        return {"axes": self.axes, **self.figures()}


@dataclass(frozen=True)
class OverallComparison:
    """A cell of the baseline's axis over all `places`: the mean difference, and the sign-flip test over the places."""

    axis: str
    name: str
    places: int
    better: int
    difference: float
    p: float
    p_holm: float

    def to_json(self) -> dict[str, Any]:
        return {
            self.axis: self.name,
            "places": self.places,
            "better": self.better,
            "difference": self.difference,
            "p": self.p,
            "p_holm": self.p_holm,
        }


@dataclass(frozen=True)
class Significance:
    """All comparisons of a grid with the cell `baseline` of `axis`."""

    baseline: str
    axis: str
    comparisons: Sequence[Comparison]
    overall: Sequence[OverallComparison]

    def to_json(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "axis": self.axis,
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "overall": [comparison.to_json() for comparison in self.overall],
        }


Tested = TypeVar("Tested", Comparison, OverallComparison)


def _corrected(comparisons: Sequence[Tested]) -> list[Tested]:
    """The comparisons with `p_holm` set."""
    corrected = holm([comparison.p for comparison in comparisons])
    return [replace(comparison, p_holm=p) for comparison, p in zip(comparisons, corrected, strict=True)]


def mean_difference(places: Sequence[tuple[Sequence[RunAnswers], Sequence[RunAnswers]]], names: tuple[str, str]) -> Difference:
    """The mean difference between two methods over places; each side of a place has one run per seed.

    Raises RunError if the runs were not tested on the same samples by the same metric.
    """
    first = places[0][0][0]
    if any(run.test != first.test for place in places for side in place for run in side):
        raise RunError(
            f"{names[0]} and {names[1]} were not tested on the same samples by the same metric; compare runs that were."
        )
    pairs = [pair for ours, theirs in places for pair in _pairs(_models(ours), _models(theirs))]
    return paired(first.metric, np.array(first.truth), first.positive, pairs, seed=0)


def _models(side: Sequence[RunAnswers]) -> list[Answered]:
    return [model for run in side for model in run.models]


def _pairs(ours: Sequence[Answered], theirs: Sequence[Answered]) -> list[tuple[Answered, Answered]]:
    """Seed with seed if both sides have as many, else each with each, which has the same mean difference."""
    if len(ours) == len(theirs):
        return list(zip(ours, theirs, strict=True))
    return [(a, b) for a in ours for b in theirs]


def against(folder: Path, grid: Grid, baseline: str, answers: AnswerCache | None = None) -> Significance:
    """Compare a grid's cells with one of them. Raises RunError if there is no such cell.

    `answers` saves reading the runs again.
    """
    axis = next((a for a in grid.axes if any(row.axes[a] == baseline for row in grid.rows)), None)
    if axis is None:
        names = {row.axes[a] for row in grid.rows for a in grid.axes}
        raise RunError(f"--baseline {baseline}: {folder} has no cell of that name; {suggest(baseline, names)}")
    answers = answers or AnswerCache(folder)
    comparisons = []
    for cells in grid.places(axis).values():
        base = cells.get(baseline)
        for name, row in cells.items():
            if base is not None and name != baseline and row.ids and base.ids:
                test = mean_difference([(answers(row), answers(base))], (name, baseline))
                comparisons.append(Comparison.of(row.axes, test))
    overall = []
    for name in dict.fromkeys(comparison.axes[axis] for comparison in comparisons):
        differences = [comparison.difference for comparison in comparisons if comparison.axes[axis] == name]
        better, p = sum(d > 0 for d in differences), sign_flip(differences, seed=0)
        overall.append(OverallComparison(axis, name, len(differences), better, statistics.fmean(differences), p, p))
    return Significance(baseline, axis, _corrected(comparisons), _corrected(overall))


def runs_against(directories: Sequence[Path], baseline: Path) -> list[Comparison]:
    """Compare single runs with the run `baseline`, under its first pattern."""
    base = RunDir(baseline)
    pattern = next(iter(base.result()["metrics"]))
    theirs, comparisons = read_answers(base, pattern), []
    for directory in directories:
        if directory != baseline:
            ours = read_answers(RunDir(directory), pattern)
            test = mean_difference([([ours], [theirs])], (str(directory), str(baseline)))
            comparisons.append(Comparison.of({"run": str(directory)}, test))
    return _corrected(comparisons)


def signed(comparison: Comparison | OverallComparison) -> str:
    """ "+3.2 (p 0.004)": the difference in points, and the corrected p."""
    p = comparison.p_holm
    return f"{100 * comparison.difference:+.1f} (p {'< 0.001' if p < 0.001 else f'{p:.3f}'})"


def significance_table(tests: Significance, across: str) -> Table:
    """Differences from the baseline in points, with `across` as columns; the last column is over all places."""
    table = Table(title=f"points above {tests.baseline}; p corrected by Holm", title_justify="left")
    axis, rows = tests.axis, tests.comparisons
    columns = list(dict.fromkeys(row.axes[across] for row in rows)) if across != axis else [""]
    downs = [a for a in (rows[0].axes if rows else [axis]) if a != across or across == axis]
    for name in downs:
        table.add_column(name)
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("over all", justify="right")
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(tuple(row.axes[a] for a in downs), {})
        line[row.axes[across] if across != axis else ""] = signed(row)
    overall = {comparison.name: signed(comparison) for comparison in tests.overall}
    for down, line in lines.items():
        table.add_row(*down, *(line.get(column, "–") for column in columns), overall[down[downs.index(axis)]])
    return table


def runs_table(comparisons: Sequence[Comparison], baseline: Path) -> Table:
    table = Table(title=f"points above {baseline}; p corrected by Holm", title_justify="left")
    for heading in ("run", "difference", "95 % interval"):
        table.add_column(heading)
    for comparison in comparisons:
        low, high = (100 * value for value in comparison.ci)
        table.add_row(comparison.axes["run"], signed(comparison), f"[{low:+.1f}, {high:+.1f}]")
    return table
