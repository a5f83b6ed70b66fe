"""How much of the gap between the baselines federated training closes, at each place of a grid and over each scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedmllm.report.answers import AnswerCache
from fedmllm.report.grids import Cells, Grid, GridRow
from fedmllm.report.paired_tests import Difference
from fedmllm.report.significance import mean_difference

BASELINES = ("zero-shot", "local", "centralised")
COMPARED = BASELINES[:2]
"""The baselines that the best method is tested against."""


@dataclass(frozen=True)
class GapClosed:
    """The best federated method between the baselines, at one place or on average over the places of a scenario.

    `best` has the highest mean `score`; it is selected on the reported score, which is therefore biased upward. `baselines`
    has the score of each kind that the grid has, `above` the paired difference from zero-shot and local over the test
    samples. `share` is (best − zero-shot) / (centralised − zero-shot), None unless centralised is above zero-shot.
    """

    label: str
    best: str
    score: float
    baselines: Mapping[str, float]
    above: Mapping[str, Difference]
    share: float | None


def method_axis(grid: Grid) -> str | None:
    """The axis whose cells determine the kind of a run, or None if all runs are of one kind."""
    for axis in grid.axes:
        kinds: dict[str, set[str]] = {}
        for row in grid.rows:
            kinds.setdefault(row.axes[axis], set()).add(row.kind)
        if all(len(of_cell) == 1 for of_cell in kinds.values()) and len(set().union(*kinds.values())) > 1:
            return axis
    return None


def gaps_by_place(grid: Grid, answers: AnswerCache) -> list[GapClosed]:
    """One entry per place that has a federated method and a baseline."""
    gaps = [_gap_closed(" · ".join(place), [rows], answers) for place, rows in _places(grid).items()]
    return [gap for gap in gaps if gap]


def gaps_by_scenario(grid: Grid, answers: AnswerCache) -> list[GapClosed]:
    """One entry per scenario: every score is the mean over its places, and `best` is the best by that mean.

    Empty if no scenario has two places. Scenarios whose places have different test samples, such as those of different tasks,
    are left out, because their scores have no common mean.
    """
    scenarios: dict[str, list[dict[str, GridRow]]] = {}
    for rows in _places(grid).values():
        # Runs that do not depend on the scenario are stored under "aligned".
        names = {row.scenario for row in rows.values() if row.kind == "federated"}
        if len(names) == 1:
            scenarios.setdefault(names.pop(), []).append(rows)
    if all(len(places) == 1 for places in scenarios.values()):
        return []
    gaps = [
        _gap_closed(f"{scenario} ({len(places)})", places, answers)
        for scenario, places in scenarios.items()
        if len({run.test for rows in places for row in rows.values() for run in answers(row)}) == 1
    ]
    return [gap for gap in gaps if gap]


def _places(grid: Grid) -> Cells:
    """place -> method -> row with a known score; empty if no axis holds the methods."""
    axis = method_axis(grid)
    places = grid.places(axis) if axis is not None else {}
    known = {place: {n: row for n, row in rows.items() if row.spread.mean is not None} for place, rows in places.items()}
    return {place: rows for place, rows in known.items() if rows}


def _gap_closed(label: str, places: Sequence[Mapping[str, GridRow]], answers: AnswerCache) -> GapClosed | None:
    """Over the methods that have the same number of runs at every place; None without a baseline or a federated method."""
    common = [n for n in places[0] if len({len(place[n].ids) if n in place else 0 for place in places}) == 1]
    rows = {name: [place[name] for place in places] for name in common}
    scores = {name: fmean(fmean(row.scores) for row in of_method) for name, of_method in rows.items()}
    baselines = {row[0].kind: name for name, row in rows.items() if row[0].kind in BASELINES}
    federated = [name for name, row in rows.items() if row[0].kind == "federated"]
    if not baselines or not federated:
        return None
    best = max(federated, key=lambda name: scores[name])
    above = {}
    for kind in COMPARED:
        if kind in baselines:
            pairs = [(answers(a), answers(b)) for a, b in zip(rows[best], rows[baselines[kind]], strict=True)]
            above[kind] = mean_difference(pairs, (best, kind))
    by_kind = {kind: scores[name] for kind, name in baselines.items()}
    start, end = by_kind.get("zero-shot"), by_kind.get("centralised")
    share = (scores[best] - start) / (end - start) if start is not None and end is not None and end > start else None
    return GapClosed(label, best, scores[best], by_kind, above, share)
