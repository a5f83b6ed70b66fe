"""Convergence: rounds, bytes and simulated time until a score is reached, from runs that were evaluated during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedmllm.report.grids import GridRow, reading
from fedmllm.report.scores import Spread, mean
from fedmllm.storage.run_dir import RunDir

STOPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
"""The rounds at which curves are reported. The steps grow because curves flatten."""


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

    `after` has the score at those of `STOPS` at which every run was evaluated.
    """

    axes: Mapping[str, str]
    runs: int
    reached: int
    rounds: float | None
    bytes: float | None
    after: Mapping[int, Spread]
    seconds: float | None = None


@dataclass(frozen=True)
class Speeds:
    """`target` is 90 % of the way from the lowest to the best score of any run, so at least one run reached it."""

    target: float
    rows: Sequence[Speed]


def curve(run: RunDir) -> list[Point]:
    """One point per round that was evaluated, and one for the end of the run."""
    with reading(run.path):
        return _curve(run.result(), run.rounds())


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
    curves = [(row, [curve(RunDir(folder / name)) for name in row.ids]) for row in rows if row.kind == "federated" and row.ids]
    scores = [point.score for _, of_row in curves for points in of_row for point in points]
    if not any(len(points) > 1 for _, of_row in curves for points in of_row):
        return None
    target = min(scores) + 0.9 * (max(scores) - min(scores))
    return Speeds(target, [_speed(row, of_row, target) for row, of_row in curves])


def _speed(row: GridRow, curves: Sequence[Sequence[Point]], target: float) -> Speed:
    hits = [point for point in (reached(points, target) for points in curves) if point]
    by_round = [{point.rounds: point.score for point in points} for points in curves]
    common = [stop for stop in STOPS if all(stop in scores for scores in by_round)]
    after = {stop: Spread.of([scores[stop] for scores in by_round]) for stop in common}
    rounds, transferred = mean([point.rounds for point in hits]), mean([point.bytes for point in hits])
    seconds = mean([point.seconds for point in hits])
    return Speed(row.axes, len(curves), len(hits), rounds, transferred, after, seconds)
