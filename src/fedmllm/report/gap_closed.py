"""How much of the gap between the baselines federated training closes, at each place of a grid and over each scenario."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmllm.report.best import Best, cross_fitted, not_beaten
from fedmllm.report.comparisons import rows_by_method
from fedmllm.report.grids import Grid, GridRow
from fedmllm.report.protocol import Resamples, Units, differences, summary
from fedmllm.report.units import UnitReader

BASELINES = ("zero-shot", "local", "centralised")
COMPARED = BASELINES[:2]
"""The baselines that the best method is compared with."""


@dataclass(frozen=True)
class GapClosed:
    """The best federated method between the baselines, at one place or on average over the places of a scenario.

    `candidates` are the federated methods that no other beats; `best` is the one with the highest mean, with its cross-fitted
    score. `baselines` has the score of each kind that the grid has, `above` the cross-fitted lead over zero-shot and local.
    `share` is (best − zero-shot) / (centralised − zero-shot), None unless centralised is above zero-shot.
    """

    label: str
    baselines: Mapping[str, float]
    candidates: Sequence[str]
    best: Best
    above: Mapping[str, Best]
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


def gaps_by_place(grid: Grid, reader: UnitReader) -> list[GapClosed]:
    """One entry per place that has a federated method and a baseline."""
    gaps = [_gap_closed(place, {place: rows}, reader) for place, rows in _places(grid).items()]
    return [gap for gap in gaps if gap]


def gaps_by_scenario(grid: Grid, reader: UnitReader) -> list[GapClosed]:
    """One entry per scenario with two places or more that are scored by one metric: scores are means over the places."""
    scenarios: dict[str, dict[str, dict[str, GridRow]]] = {}
    for place, rows in _places(grid).items():
        # Runs that do not depend on the scenario are stored under "aligned".
        names = {row.scenario for row in rows.values() if row.kind == "federated"}
        if len(names) == 1:
            scenarios.setdefault(names.pop(), {})[place] = rows
    gaps = [
        _gap_closed(f"{scenario} ({len(places)})", places, reader)
        for scenario, places in scenarios.items()
        if len(places) > 1 and len({row.metric for rows in places.values() for row in rows.values()}) == 1
    ]
    return [gap for gap in gaps if gap]


def _places(grid: Grid) -> dict[str, dict[str, GridRow]]:
    """place -> method -> row with a complete run; empty if no axis holds the methods."""
    axis = method_axis(grid)
    places: dict[str, dict[str, GridRow]] = {}
    for name, rows in rows_by_method(grid, axis).items() if axis is not None else ():
        for place, row in rows.items():
            places.setdefault(place, {})[name] = row
    return places


def _gap_closed(label: str, places: Mapping[str, Mapping[str, GridRow]], reader: UnitReader) -> GapClosed | None:
    """Over the methods that every place has; None without a baseline, a federated method, or a unit that all of them have."""
    first = next(iter(places.values()))
    common = [name for name in first if all(name in rows for rows in places.values())]
    kinds = {name: first[name].kind for name in common}
    baselines = {kind: name for name, kind in kinds.items() if kind in BASELINES}
    federated = [name for name, kind in kinds.items() if kind == "federated"]
    if not baselines or not federated:
        return None
    matched = reader.match({name: {place: rows[name] for place, rows in places.items()} for name in common})
    scores, resamples = {n: matched.scores[n] for n in federated}, matched.resamples
    best = cross_fitted(scores, {n: resamples[n] for n in federated} if resamples else None)
    if best is None:
        return None
    above: dict[str, Best | None] = {}
    for kind in COMPARED:
        if kind in baselines:
            leads: dict[str, Units] = {n: differences(scores[n], matched.scores[baselines[kind]]) for n in federated}
            spread: dict[str, Resamples] | None = None
            if resamples:
                spread = {n: differences(resamples[n], resamples[baselines[kind]]) for n in federated}
            above[kind] = cross_fitted(leads, spread)
    means = {kind: summary(matched.scores[name]).estimate for kind, name in baselines.items()}
    start, end = means.get("zero-shot", math.nan), means.get("centralised", math.nan)
    share = (best.score - start) / (end - start) if end > start and not math.isnan(best.score) else None
    known = {kind: lead for kind, lead in above.items() if lead}
    return GapClosed(
        label, means, not_beaten(scores, {n: resamples[n] for n in federated} if resamples else None), best, known, share
    )
