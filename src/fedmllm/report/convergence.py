"""Convergence: rounds, bytes and simulated time until a score is reached, from runs that were evaluated during training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedmllm.report.comparisons import axis_of, interval, replicated
from fedmllm.report.curves import Line, curves, mean_line
from fedmllm.report.grids import GridRow, reading
from fedmllm.report.page import Page
from fedmllm.report.protocol import compare, summary
from fedmllm.report.scores import UNKNOWN, Spread, mean, score
from fedmllm.report.sections import Chapter
from fedmllm.storage.run_dir import RunDir

STOPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
"""The rounds at which curves are reported. The steps grow because curves flatten."""
LEVELS = (0.5, 0.75, 0.9)
"""How far levels are from the lowest to the best score of any run, so that at least one run reaches them."""


class Point(NamedTuple):
    """One evaluation of a run: rounds completed, bytes transferred so far, score, and seconds on the virtual clock."""

    rounds: int
    bytes: int
    score: float
    seconds: float | None = None


@dataclass(frozen=True)
class Speed:
    """How fast one federated cell reached the target: `reached` of its `runs` did, after `rounds`, `bytes` and, if all of them
    have a virtual clock, simulated `seconds` on average.

    `after` has the score at those of `STOPS` at which every run was evaluated. `units` maps every replicate or seed to the
    points of its run.
    """

    axes: Mapping[str, str]
    runs: int
    reached: int
    rounds: float | None
    bytes: float | None
    after: Mapping[int, Spread]
    units: Mapping[str, Sequence[Point]]
    seconds: float | None = None

    @property
    def timed(self) -> bool:
        """Whether all runs have a virtual clock."""
        points = [point for of_unit in self.units.values() for point in of_unit]
        return bool(points) and all(point.seconds is not None for point in points)

    def times(self, level: float) -> dict[str, float]:
        """unit -> the simulated seconds until its score first reaches the level; NaN if it never does."""
        hits = {unit: reached(points, level) for unit, points in self.units.items()}
        return {unit: math.nan if hit is None or hit.seconds is None else hit.seconds for unit, hit in hits.items()}


@dataclass(frozen=True)
class Speeds:
    """The levels are `LEVELS` of the way from the lowest to the best score of any run; the target is the highest of them."""

    levels: Sequence[float]
    rows: Sequence[Speed]

    @property
    def target(self) -> float:
        return self.levels[-1]


def curve(run: RunDir) -> list[Point]:
    """One point per round that was evaluated, and one for the end of the run; without those whose score is not defined, such
    as the AUC of a single class."""
    with reading(run.path):
        points = [point for point in _curve(run.result(), run.rounds()) if not math.isnan(point.score)]
        if not all(0 <= p.score <= 1 and p.bytes < 2**63 and 0 <= (p.seconds or 0.0) <= 1e15 for p in points):
            raise ValueError("a score is not between 0 and 1, or bytes or a time are out of range")
        return points


def _curve(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[Point]:
    metric, pattern = result["primary_metric"], next(iter(result["metrics"]), None)
    if pattern is None:  # no test sample had what the experiment wanted to show
        return []
    transferred, points, seconds = 0, list[Point](), None
    for record in records:
        clock = record.get("clock")
        seconds = float(clock["began"] + clock["seconds"]) if clock else None
        transferred += sum(record["bytes_up"].values()) + sum(record["bytes_down"].values())
        if record.get("metrics"):
            points.append(Point(record["round"] + 1, transferred, float(record["metrics"][pattern][metric]), seconds))
    if records and (not points or points[-1].rounds < len(records)):
        points.append(Point(len(records), transferred, float(result["metrics"][pattern][metric]), seconds))
    return points


def reached(points: Sequence[Point], target: float) -> Point | None:
    """The first point with a score of `target` or more."""
    return next((point for point in points if point.score >= target), None)


def speeds(folder: Path, rows: Sequence[GridRow]) -> Speeds | None:
    """The speeds of a grid's federated cells; None if no run was evaluated before its end."""
    by_run = [
        (row, {name: curve(RunDir(folder / name)) for name in row.ids}) for row in rows if row.kind == "federated" and row.ids
    ]
    scores = [point.score for _, of_row in by_run for points in of_row.values() for point in points]
    if not any(len(points) > 1 for _, of_row in by_run for points in of_row.values()):
        return None
    low, best = min(scores), max(scores)
    levels = [low + share * (best - low) for share in LEVELS]
    return Speeds(levels, [_speed(row, of_row, levels[-1]) for row, of_row in by_run])


def _speed(row: GridRow, by_run: Mapping[str, Sequence[Point]], target: float) -> Speed:
    hits = [point for point in (reached(points, target) for points in by_run.values()) if point]
    by_round = [{point.rounds: point.score for point in points} for points in by_run.values()]
    common = [stop for stop in STOPS if all(stop in scores for scores in by_round)]
    after = {stop: Spread.of([scores[stop] for scores in by_round]) for stop in common}
    rounds, transferred = mean([point.rounds for point in hits]), mean([point.bytes for point in hits])
    units = {unit: by_run[name] for unit, name in row.units.items()}
    seconds = mean([point.seconds for point in hits])
    return Speed(row.axes, len(by_run), len(hits), rounds, transferred, after, units, seconds)


def add_speed(page: Page, chapter: Chapter, baseline: str | None) -> None:
    """Rounds, bytes and simulated time until the target, and the scores on the way there."""
    convergence = speeds(chapter.folder, chapter.grid.rows)
    if convergence is None:
        return
    axes = chapter.grid.axes
    page.heading(
        3,
        f"Rounds and bytes to {100 * convergence.target:.1f}",
        "The target is 90 % of the way from the lowest to the best score of all these runs.",
    )
    table, timed = [], any(speed.timed for speed in convergence.rows)
    for speed in convergence.rows:
        rounds = UNKNOWN if speed.rounds is None else f"{speed.rounds:.1f}"
        transferred = UNKNOWN if speed.bytes is None else f"{speed.bytes / 1e6:.2f}"
        seconds = [] if not timed else [UNKNOWN if speed.seconds is None else f"{speed.seconds:.1f}"]
        table.append([*speed.axes.values(), f"{speed.reached} of {speed.runs}", rounds, transferred, *seconds])
    columns = ["runs that reach it", "rounds", "MB", *(["simulated seconds"] if timed else [])]
    page.table([*axes, *columns], table, len(axes))
    if stops := sorted({stop for speed in convergence.rows for stop in speed.after}):
        page.paragraph("A score that was reached need not last. After so many rounds:")
        table = [[*speed.axes.values(), *(score(speed.after.get(stop)) for stop in stops)] for speed in convergence.rows]
        page.table([*axes, *map(str, stops)], table, len(axes))
    if timed:
        _add_time(page, chapter, convergence, baseline)


def _add_time(page: Page, chapter: Chapter, convergence: Speeds, baseline: str | None) -> None:
    """The simulated time to several scores, as a share of the baseline's, and the curves."""
    axes, levels = chapter.grid.axes, convergence.levels
    page.heading(
        3,
        "Simulated time to a score",
        "Seconds on the virtual clock at the first evaluation that reaches a score, the mean with a 95 % interval over "
        "replicates. Where only some of them reach it, their number and the median of all, if more than half do. The scores "
        "are 50, 75 and 90 % of the way from the lowest to the best of all these runs. A round of an asynchronous run is a "
        "step of its server.",
    )
    rows = [speed for speed in convergence.rows if speed.timed]
    head = [*axes, *(f"{100 * level:.1f}" for level in levels)]
    page.table(head, [[*s.axes.values(), *(_time(s.times(level)) for level in levels)] for s in rows], len(axes))
    if baseline is not None:
        axis = axis_of(chapter.grid, baseline, chapter.folder)
        names = [speed.axes[axis] for speed in rows]  # a baseline that is not federated has no clock
        base, by_axes = baseline if baseline in names else names[0], {tuple(s.axes.values()): s for s in rows}
        pairs = [(speed, by_axes.get(tuple({**speed.axes, axis: base}.values()))) for speed in rows if speed.axes[axis] != base]
        table = [[*s.axes.values(), *(_ratio(s.times(x), b.times(x)) for x in levels)] for s, b in pairs if b]
        if table:
            page.paragraph(
                f"The time as a multiple of that of {base}: the geometric mean with its 95 % interval over the replicates in "
                "which both reach the score."
            )
            page.table(head, table, len(axes))
    if len(rows) == len(convergence.rows):
        caption = f"{chapter.grid.name}: score against rounds, bytes and simulated time, the mean over replicates"
        page.picture(caption, f"figures/{chapter.grid.name}-time.svg", _picture(chapter, rows))


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _time(times: Mapping[str, float]) -> str:
    """ "1,200 [1,000, 1,400]"; "3 of 5, median 1,300" if some never reach the score, and "never" if none does."""
    hits = [time for time in times.values() if not math.isnan(time)]
    if len(hits) == len(times):
        return interval(summary({"": times}), _seconds)
    median = statistics.median([*hits, *[math.inf] * (len(times) - len(hits))])
    known = f", median {_seconds(median)}" if math.isfinite(median) else ""
    return f"{len(hits)} of {len(times)}{known}" if hits else "never"


def _ratio(ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    """ "0.52 [0.41, 0.66]", from differences of logarithms, paired by replicate."""
    logs = [{unit: math.log(time) if time > 0 else math.nan for unit, time in times.items()} for times in (ours, theirs)]
    return replicated(compare({"": logs[0]}, {"": logs[1]}), _multiple)


def _multiple(log: float) -> str:
    """Two replicates far apart have an interval without end."""
    return f"{math.exp(log):.2f}" if log < 7 else "> 1000"


def _picture(chapter: Chapter, rows: Sequence[Speed]) -> str:
    """Rows of panels by the first axis, lines by the others."""
    places: dict[str, dict[str, dict[str, Line]]] = {}
    costs: dict[str, Callable[[Point], float]] = {
        "rounds": lambda point: point.rounds,
        "MB": lambda point: point.bytes / 1e6,
        "simulated seconds": lambda point: point.seconds or 0.0,
    }
    for speed in rows:
        name = " · ".join(speed.axes[axis] for axis in chapter.downs)
        runs = [points for points in speed.units.values() if points]
        for label, cost in costs.items():
            lines = places.setdefault(speed.axes.get(chapter.across, ""), {}).setdefault(label, {})
            if runs:
                lines[name] = mean_line([[(cost(point), 100 * point.score) for point in run] for run in runs])
    return curves(f"{chapter.grid.name}: score, %", places)
