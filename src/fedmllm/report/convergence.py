"""How fast a method gets there: rounds and bytes until a score is reached, from runs that were tested on the way."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmllm.report.grids import spread
from fedmllm.storage.run_dir import RunDir

STOPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
"""The rounds after which a curve is told: ever further apart, as curves get flatter."""


def curve(run: RunDir) -> list[tuple[int, int, float]]:
    """(rounds done, bytes moved so far, score) after each round that was tested, the end of the run included."""
    result = run.result()
    metric, pattern = result["primary_metric"], next(iter(result["metrics"]))
    moved, found = 0, []
    records = run.rounds()
    for record in records:
        moved += sum(record["bytes_up"].values()) + sum(record["bytes_down"].values())
        if record.get("metrics"):
            found.append((record["round"] + 1, moved, float(record["metrics"][pattern][metric])))
    if records and (not found or found[-1][0] < len(records)):
        found.append((len(records), moved, float(result["metrics"][pattern][metric])))
    return found


def reached(points: Sequence[tuple[int, int, float]], target: float) -> tuple[int, int] | None:
    """(rounds, bytes) at the first test that scored `target` or more."""
    return next(((rounds, moved) for rounds, moved, score in points if score >= target), None)


def speeds(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"target", "rows": [{axes, "runs", "reached", "rounds", "bytes", "after"}]} of a grid's federated cells.

    The target is 90 % of the way from the lowest to the best score that any of the runs has: no method is asked for more than
    one of them gave. Rounds and bytes are the mean over the seeds that reach it. `after` is round -> {"mean", "sd"} at those of
    `STOPS` where every seed was tested. Empty where nothing was tested on the way.
    """
    curves = {
        tuple(row["axes"].items()): [curve(RunDir(folder / name)) for name in row["ids"]]
        for row in rows
        if row["kind"] == "federated" and row["ids"]
    }
    scores = [score for found in curves.values() for points in found for _, _, score in points]
    if not any(len(points) > 1 for found in curves.values() for points in found):
        return {}
    target = min(scores) + 0.9 * (max(scores) - min(scores))
    told = []
    for axes, found in curves.items():
        there = [one for one in (reached(points, target) for points in found) if one]
        told.append(
            {
                "axes": dict(axes),
                "runs": len(found),
                "reached": len(there),
                "rounds": statistics.fmean(r for r, _ in there) if there else None,
                "bytes": statistics.fmean(b for _, b in there) if there else None,
                "after": _after(found),
            }
        )
    return {"target": target, "rows": told}


def _after(curves: Sequence[Sequence[tuple[int, int, float]]]) -> dict[int, dict[str, float | None]]:
    by_round = [{rounds: score for rounds, _, score in points} for points in curves]
    common = [stop for stop in STOPS if all(stop in scores for scores in by_round)]
    return {stop: spread([scores[stop] for scores in by_round]) for stop in common}
