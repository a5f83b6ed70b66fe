"""Finished runs compared with a baseline by the protocol of docs/statistics.md: one difference per replicate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from fedmllm.errors import RunError, suggest
from fedmllm.report.best import not_beaten
from fedmllm.report.grids import Grid, GridRow
from fedmllm.report.protocol import Comparison, common_term, compare, holm, summary
from fedmllm.report.scores import UNKNOWN
from fedmllm.report.sentences import best_set, conclusion, points, remarks
from fedmllm.report.tables import short_names
from fedmllm.report.units import Rows, UnitReader, read_unit
from fedmllm.storage.run_dir import RunDir


@dataclass(frozen=True)
class MethodComparison:
    """One method against the baseline: its `mean` over the places, the comparison over all `places` with p corrected for the
    number of methods, and the comparison at each place, which has an interval and no p."""

    name: str
    mean: float
    overall: Comparison
    p_holm: float
    by_place: Mapping[str, Comparison]

    def to_json(self, axis: str) -> dict[str, Any]:
        return {
            axis: self.name,
            "places": len(self.by_place),
            "better": sum(at.estimate > 0 for at in self.by_place.values()),
            **_figures(self.overall),
            "p": self.overall.p,
            "p_holm": self.p_holm,
            "mde": self.overall.mde,
            "margin": self.overall.margin,
            "units": self.overall.units,
            "dropped": self.overall.dropped,
            "lost": self.overall.lost,
            "worst": self.overall.worst,
            "dominant": self.overall.dominant,
            "common": self.overall.common,
        }


def _figures(comparison: Comparison) -> dict[str, Any]:
    return {"difference": comparison.estimate, "ci": [comparison.low, comparison.high]}


@dataclass(frozen=True)
class Comparisons:
    """All methods of a grid, the cells of `axis`, against its cell `baseline`. `shared` is that of `units.Matched`; `margin` is
    the largest difference that does not matter, as a share of 1, if the sweep declared it."""

    baseline: str
    axis: str
    methods: Sequence[MethodComparison]
    places: Mapping[str, Mapping[str, str]]
    """place -> its value on each axis but `axis`."""
    shared: bool
    margin: float | None
    not_beaten: Sequence[str]
    """The cells of `axis`, the baseline among them, that no other beats over the places that all of them have."""

    def to_json(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "axis": self.axis,
            "comparisons": [
                {"axes": {**self.places[place], self.axis: method.name}, **_figures(at), "p": None, "p_holm": None}
                for method in self.methods
                for place, at in method.by_place.items()
            ],
            "overall": [method.to_json(self.axis) for method in self.methods],
            "not_beaten": self.not_beaten,
        }


def axis_of(grid: Grid, baseline: str, folder: Path) -> str:
    """The axis that has a cell of the name given as `--baseline`. Raises RunError if none has."""
    for axis in grid.axes:
        if any(row.axes[axis] == baseline for row in grid.rows):
            return axis
    names = {row.axes[axis] for row in grid.rows for axis in grid.axes}
    raise RunError(f"--baseline {baseline}: {folder} has no cell of that name; {suggest(baseline, names)}")


def comparable(grid: Grid, axis: str) -> bool:
    """Whether cells that differ on this axis alone share their draws of the data, and so can be compared."""
    draws: dict[tuple[tuple[str, ...], str], set[int]] = {}
    for row in grid.rows:
        place = tuple(value for name, value in row.axes.items() if name != axis)
        for unit, draw in row.draws.items():
            draws.setdefault((place, unit), set()).add(draw)
    return all(len(shared) == 1 for shared in draws.values())


def rows_by_method(grid: Grid, axis: str) -> dict[str, dict[str, GridRow]]:
    """cell of `axis` -> place, "α = 0.5 · 8 clients" -> row, for the rows with a complete run."""
    methods: dict[str, dict[str, GridRow]] = {}
    for row in grid.rows:
        place = " · ".join(value for name, value in row.axes.items() if name != axis)
        methods.setdefault(row.axes[axis], {})[place] = row
    return {name: {place: row for place, row in rows.items() if row.ids} for name, rows in methods.items()}


def against(folder: Path, grid: Grid, baseline: str, reader: UnitReader | None = None) -> Comparisons:
    """Compare a grid's cells with one of them; `reader` saves reading the runs again.

    Raises RunError if there is no such cell, or if the cells do not share their data.
    """
    axis = axis_of(grid, baseline, folder)
    reader, methods = reader or UnitReader(folder), rows_by_method(grid, axis)
    base, compared, shared = methods[baseline], list[MethodComparison](), False
    for name, rows in methods.items():
        if name == baseline or not rows.keys() & base.keys():
            continue
        by_place = {}
        for place in rows:
            if place in base:
                by_place[place], _, _ = _compare(reader, {place: rows[place]}, {place: base[place]}, (name, baseline))
        overall, mean, shared = _compare(reader, rows, base, (name, baseline))
        if grid.mixed_metrics:  # scores by different metrics have no common mean
            overall, mean = summary({}), math.nan
        compared.append(MethodComparison(name, mean, overall, overall.p, by_place))
    corrected = holm([method.overall.p for method in compared])
    compared = [replace(method, p_holm=p) for method, p in zip(compared, corrected, strict=True)]
    places = {
        place: {name: value for name, value in row.axes.items() if name != axis}
        for rows in methods.values()
        for place, row in rows.items()
    }
    margin = None if grid.margin is None else grid.margin / 100
    matched = reader.match({name: rows for name, rows in methods.items() if rows})
    known = matched.places and not grid.mixed_metrics and any(not math.isnan(method.overall.p) for method in compared)
    best = not_beaten(matched.scores, matched.resamples) if known else []
    return Comparisons(baseline, axis, compared, places, shared, margin, best)


def _compare(reader: UnitReader, ours: Rows, theirs: Rows, names: tuple[str, str]) -> tuple[Comparison, float, bool]:
    """(the comparison over the common places, our mean score over them, whether units are means over places)."""
    matched = reader.match({names[0]: ours, names[1]: theirs})
    resamples = matched.resamples
    c = common_term(resamples[names[0]], resamples[names[1]]) if resamples else 0.0
    comparison = compare(matched.scores[names[0]], matched.scores[names[1]], c)
    lost = (*comparison.lost, *(place for place in {**theirs, **ours} if place not in matched.places))
    comparison = replace(comparison, places=len(matched.places) - len(comparison.lost), lost=lost)
    return comparison, summary(matched.scores[names[0]]).estimate, matched.shared


def runs_against(directories: Sequence[Path], baseline: Path) -> dict[Path, float]:
    """run -> its score minus that of the run `baseline`, under the baseline's first pattern.

    One run each is one unit, which says nothing about other seeds or data, so there is neither an interval nor a p. Raises
    RunError if the runs were not tested on the same samples by the same metric.
    """
    base = RunDir(baseline)
    pattern = next(iter(base.result()["metrics"]))
    theirs, differences = read_unit(base, pattern), {}
    for directory in directories:
        if directory != baseline:
            ours = read_unit(RunDir(directory), pattern)
            if (ours.metric, ours.tested) != (theirs.metric, theirs.tested):
                raise RunError(
                    f"{directory} and {baseline} were not tested on the same samples by the same metric; compare runs "
                    "that were."
                )
            differences[directory] = ours.score - theirs.score
    return differences


def conclusions(comparisons: Comparisons) -> list[str]:
    """One sentence per method, and what a reader should know of the data behind it."""
    sentences = []
    for method in comparisons.methods:
        names = (method.name, comparisons.baseline)
        if method.overall.units:
            sentences.append(conclusion(method.overall, *names, method.p_holm, comparisons.margin))
            sentences += remarks(method.overall, *names)
    return sentences + ([best_set(comparisons.not_beaten)] if comparisons.not_beaten else [])


def interval(comparison: Comparison, write: Callable[[float], str] = points) -> str:
    """ "+3.2 [+1.0, +5.4]", in points or as `write` has it, or the number alone if it has no interval."""
    bounds = "" if math.isnan(comparison.low) else f" [{write(comparison.low)}, {write(comparison.high)}]"
    return write(comparison.estimate) + bounds


def replicated(comparison: Comparison, write: Callable[[float], str] = points) -> str:
    """The interval, with " (3 of 5)" if only so many units have what it is about; a dash without any."""
    units = comparison.units + comparison.dropped
    some = f" ({comparison.units} of {units})" if comparison.dropped else ""
    return interval(comparison, write) + some if comparison.units else UNKNOWN


HEAD = ("mean", "points above", "p (Holm)", "MDE", "not larger than ±", "worst", "units")


def figures(method: MethodComparison) -> list[str]:
    """The cells below HEAD."""
    overall, p = method.overall, method.p_holm
    dropped = f" ({overall.dropped} dropped)" if overall.dropped else ""
    return [
        UNKNOWN if math.isnan(method.mean) else f"{100 * method.mean:.1f}",
        interval(overall),
        UNKNOWN if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}",
        points(overall.mde, ""),
        points(overall.margin, ""),
        points(overall.worst),
        f"{overall.units}{dropped}",
    ]


def comparisons_table(comparisons: Comparisons) -> Table:
    """The comparison of each method over all places."""
    table = Table(
        title=f"points above {comparisons.baseline} [95 %], over {len(comparisons.places)} places", title_justify="left"
    )
    table.add_column(comparisons.axis)
    for heading in HEAD:
        table.add_column(heading, justify="right")
    for method in comparisons.methods:
        table.add_row(method.name, *figures(method))
    return table


def places_table(comparisons: Comparisons) -> Table:
    """The comparison at each place: an interval and no p."""
    table = Table(title=f"points above {comparisons.baseline} [95 %] at each place", title_justify="left")
    table.add_column("place")
    for method in comparisons.methods:
        table.add_column(method.name, justify="right")
    for place in comparisons.places:
        at = [method.by_place.get(place) for method in comparisons.methods]
        table.add_row(place, *(interval(comparison) if comparison else UNKNOWN for comparison in at))
    return table


def runs_table(differences: Mapping[Path, float], baseline: Path) -> Table:
    table = Table(title=f"points above {baseline}; one run each, so without an interval", title_justify="left")
    table.add_column("run")
    table.add_column("difference", justify="right")
    for name, difference in zip(short_names(list(differences)), differences.values(), strict=True):
        table.add_row(name, points(difference))
    return table
