"""Finished runs against a baseline: paired differences on the same test samples, corrected for their number.

Cells of a grid are compared with the baseline's cell at the same place on the other axes. Over the places, a second test asks
whether the method is better in general.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fedmllm.errors import RunError, suggest
from fedmllm.report.grids import place_of
from fedmllm.report.paired_tests import Answered, holm, paired, sign_flip
from fedmllm.storage.run_dir import RunDir


@dataclass(frozen=True)
class RunAnswers:
    """What one run answered under one pattern: the models it tested, each on the samples `ids` with answers `truth`."""

    metric: str
    positive: str | None
    ids: tuple[str, ...]
    truth: tuple[str, ...]
    models: tuple[Answered, ...]

    @property
    def test(self) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """What was asked and how it is scored: scores of runs that differ in it have no common mean."""
        return self.metric, self.ids, self.truth


def read_taken(run: RunDir, pattern: str) -> RunAnswers:
    """Raises RunError where the run is not complete or kept no predictions of the pattern, or not what AUC needs."""
    result = run.result()
    lines = [line for line in run.predictions() if line["pattern"] == pattern]
    if not lines:
        raise RunError(f"{run.path}: predictions.jsonl has none under the pattern {pattern!r}; the run must be made again.")
    if result["primary_metric"] == "auc" and not result.get("positive"):
        raise RunError(f"{run.path}: its result does not say which answer is the positive one; the run must be made again.")
    models: dict[Any, list[Mapping[str, Any]]] = {}
    for line in lines:
        models.setdefault(line.get("client"), []).append(line)
    first = next(iter(models.values()))
    answered = tuple(
        Answered(
            np.array([line["predicted"] if not line["correct"] else line["answer"] for line in found]),
            np.array([np.nan if line["score"] is None else line["score"] for line in found], dtype=np.float64),
        )
        for found in models.values()
    )
    metric = result["primary_metric"]
    return RunAnswers(
        metric, result.get("positive"), tuple(x["id"] for x in first), tuple(x["answer"] for x in first), answered
    )


def difference(ours: Sequence[RunAnswers], theirs: Sequence[RunAnswers], names: tuple[str, str]) -> dict[str, Any]:
    """{"difference", "ci", "p"} of two methods' runs, a seed each. Raises RunError where they answered different samples."""
    return mean_difference([(ours, theirs)], names)


def mean_difference(
    places: Sequence[tuple[Sequence[RunAnswers], Sequence[RunAnswers]]], names: tuple[str, str]
) -> dict[str, Any]:
    """`difference` of the means over several places, each with as many runs as the others, on the same test samples."""
    head = places[0][0][0]
    if any(one.test != head.test for place in places for side in place for one in side):
        raise RunError(
            f"{names[0]} and {names[1]} were not tested on the same samples by the same metric; compare runs that were."
        )
    pairs = [pair for ours, theirs in places for pair in _pairs(_models(ours), _models(theirs))]
    found = paired(head.metric, np.array(head.truth), head.positive, pairs, seed=0)
    return {"difference": found.difference, "ci": [found.low, found.high], "p": found.p}


def _models(side: Sequence[RunAnswers]) -> list[Answered]:
    return [model for one in side for model in one.models]


def _pairs(ours: Sequence[Answered], theirs: Sequence[Answered]) -> list[tuple[Answered, Answered]]:
    """Seed with seed where there are as many; else each with each, which has the same mean difference."""
    if len(ours) == len(theirs):
        return list(zip(ours, theirs, strict=True))
    return [(a, b) for a in ours for b in theirs]


class AnswerCache:
    """What the runs of a sweep answered, each read once however often it is compared."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, RunAnswers] = {}

    def __call__(self, row: Mapping[str, Any]) -> list[RunAnswers]:
        """Of the complete runs of a row of `read_grid`."""
        for name in row["ids"]:
            if name not in self._known:
                self._known[name] = read_taken(RunDir(self._folder / name), row["pattern"])
        return [self._known[name] for name in row["ids"]]


def against(folder: Path, grid: Mapping[str, Any], baseline: str, taken: AnswerCache | None = None) -> dict[str, Any]:
    """{"baseline", "axis", "comparisons", "overall"} of a grid that `read_grid` read; `taken` where its runs were read before.

    `comparisons` has a row a cell but the baseline's: difference, ci, p, `p_holm` over all of them. `overall` has a row a
    method: the mean difference over the places, the test by signs over them, and its `p_holm`. Raises RunError where no axis
    has a cell of that name.
    """
    axis = next((a for a in grid["axes"] if any(row["axes"][a] == baseline for row in grid["rows"])), None)
    if axis is None:
        names = {row["axes"][a] for row in grid["rows"] for a in grid["axes"]}
        raise RunError(f"--baseline {baseline}: {folder} has no cell of that name; {suggest(baseline, names)}")
    places: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for row in grid["rows"]:
        places.setdefault(place_of(row, axis), {})[row["axes"][axis]] = row
    taken = taken or AnswerCache(folder)
    found = []
    for cells in places.values():
        base = cells.get(baseline)
        for name, row in cells.items():
            if base is not None and name != baseline and row["ids"] and base["ids"]:
                found.append({"axes": row["axes"], **difference(taken(row), taken(base), (name, baseline))})
    for one, corrected in zip(found, holm([one["p"] for one in found]), strict=True):
        one["p_holm"] = corrected
    overall = []
    for name in dict.fromkeys(one["axes"][axis] for one in found):
        differences = [one["difference"] for one in found if one["axes"][axis] == name]
        overall.append(
            {
                axis: name,
                "places": len(differences),
                "better": sum(d > 0 for d in differences),
                "difference": statistics.fmean(differences),
                "p": sign_flip(differences, seed=0),
            }
        )
    for one, corrected in zip(overall, holm([one["p"] for one in overall]), strict=True):
        one["p_holm"] = corrected
    return {"baseline": baseline, "axis": axis, "comparisons": found, "overall": overall}


def runs_against(directories: Sequence[Path], baseline: Path) -> list[dict[str, Any]]:
    """The same for single runs, under the first pattern of the baseline."""
    base = RunDir(baseline)
    pattern = next(iter(base.result()["metrics"]))
    theirs, found = read_taken(base, pattern), []
    for directory in directories:
        if directory != baseline:
            ours = read_taken(RunDir(directory), pattern)
            found.append({"run": str(directory), **difference([ours], [theirs], (str(directory), str(baseline)))})
    for one, corrected in zip(found, holm([one["p"] for one in found]), strict=True):
        one["p_holm"] = corrected
    return found


def signed(one: Mapping[str, Any]) -> str:
    """ "+3.2 (p 0.004)": points of difference, and p corrected by Holm."""
    p = one["p_holm"]
    return f"{100 * one['difference']:+.1f} (p {'< 0.001' if p < 0.001 else f'{p:.3f}'})"


def significance_table(found: Mapping[str, Any], across: str) -> Table:
    """Differences from the baseline in points, the axis `across` across, and over all places in the last column."""
    table = Table(title=f"points above {found['baseline']}; p corrected by Holm", title_justify="left")
    axis, rows = found["axis"], found["comparisons"]
    columns = list(dict.fromkeys(row["axes"][across] for row in rows)) if across != axis else [""]
    downs = [a for a in (rows[0]["axes"] if rows else [axis]) if a != across or across == axis]
    for name in downs:
        table.add_column(name)
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("over all", justify="right")
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(tuple(row["axes"][a] for a in downs), {})
        line[row["axes"][across] if across != axis else ""] = signed(row)
    general = {one[axis]: signed(one) for one in found["overall"]}
    for down, line in lines.items():
        table.add_row(*down, *(line.get(column, "–") for column in columns), general[down[downs.index(axis)]])
    return table


def runs_table(found: Sequence[Mapping[str, Any]], baseline: Path) -> Table:
    table = Table(title=f"points above {baseline}; p corrected by Holm", title_justify="left")
    for heading in ("run", "difference", "95 % interval"):
        table.add_column(heading)
    for one in found:
        low, high = (100 * value for value in one["ci"])
        table.add_row(one["run"], signed(one), f"[{low:+.1f}, {high:+.1f}]")
    return table
