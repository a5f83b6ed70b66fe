"""How far federating goes: at each place of a grid, and over each scenario, the best federated method between the baselines."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedmllm.report.grids import place_of
from fedmllm.report.significance import AnswerCache, mean_difference

BASELINES = ("zero-shot", "local", "centralised")


def method_axis(grid: Mapping[str, Any]) -> str | None:
    """The axis whose cells say the kind of a run; None where all are of one kind."""
    kinds: dict[str, dict[str, set[str]]] = {axis: {} for axis in grid["axes"]}
    for row in grid["rows"]:
        for axis in grid["axes"]:
            kinds[axis].setdefault(row["axes"][axis], set()).add(row["kind"])
    fitting = [
        axis
        for axis, cells in kinds.items()
        if all(len(found) == 1 for found in cells.values()) and len(set.union(*cells.values())) > 1
    ]
    return fitting[0] if fitting else None


Row = Mapping[str, Any]
"""Of `read_grid`."""


def ways(taken: AnswerCache, grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{"place", "best", "score", kind: score, "above": {kind: {"difference", "ci"}}, "share"} of each place that has a
    federated method and a baseline.

    `best` is the federated method with the highest mean at that place: chosen by what is then told of it, so its lead is
    flattered. `above` has zero-shot and local with paired 95 % intervals over the test samples; `share` is (best − zero-shot) /
    (centralised − zero-shot), None where centralised is not above zero-shot.
    """
    places = _places(grid)
    found = [({"place": place}, _told(taken, [rows])) for place, rows in places.items()]
    return [{**head, **told} for head, told in found if told]


def scenario_ways(taken: AnswerCache, grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same over all places of a scenario, with "scenario" and the number of "places" in place of "place": each figure is
    the mean over the places, and `best` is best by it. Empty where no scenario has two places that are complete; without a
    scenario whose places are tested on different samples, of other tasks for example: their scores have no mean."""
    places = _places(grid)
    scenarios: dict[str, list[dict[str, Row]]] = {}
    for rows in places.values():
        # Of a run that depends on no scenario the result says "aligned".
        names = {row["scenario"] for row in rows.values() if row["kind"] == "federated"}
        if len(names) == 1:
            scenarios.setdefault(names.pop(), []).append(rows)
    if all(len(members) == 1 for members in scenarios.values()):
        return []
    found = [({"scenario": s, "places": len(m)}, _told(taken, m)) for s, m in scenarios.items() if _one_test(taken, m)]
    return [{**head, **told} for head, told in found if told]


def _one_test(taken: AnswerCache, places: Sequence[Mapping[str, Row]]) -> bool:
    return len({run.test for rows in places for row in rows.values() for run in taken(row)}) == 1


def _places(grid: Mapping[str, Any]) -> dict[tuple[str, ...], dict[str, Row]]:
    """place -> method -> row; nothing where no axis says the method."""
    axis = method_axis(grid)
    places: dict[tuple[str, ...], dict[str, Row]] = {}
    if axis is not None:
        for row in grid["rows"]:
            if row["ids"]:
                places.setdefault(place_of(row, axis), {})[row["axes"][axis]] = row
    return places


def _told(taken: AnswerCache, places: Sequence[Mapping[str, Row]]) -> dict[str, Any]:
    """Of the methods that all the places have, with as many runs in each; {} without a baseline or a federated one."""
    common = [n for n in places[0] if len({len(place[n]["ids"]) if n in place else 0 for place in places}) == 1]
    rows = {name: [place[name] for place in places] for name in common}
    means = {name: statistics.fmean(row["mean"] for row in mine) for name, mine in rows.items()}
    kinds = {name: mine[0]["kind"] for name, mine in rows.items()}
    base = {kind: name for name, kind in kinds.items() if kind in BASELINES}
    federated = [name for name, kind in kinds.items() if kind == "federated"]
    if not base or not federated:
        return {}
    best = max(federated, key=lambda name: means[name])
    told: dict[str, Any] = {"best": best, "score": means[best], "above": {}, "share": None}
    told |= {kind: means[base[kind]] if kind in base else None for kind in BASELINES}
    for kind in BASELINES[:2]:
        if kind in base:
            pairs = [(taken(a), taken(b)) for a, b in zip(rows[best], rows[base[kind]], strict=True)]
            told["above"][kind] = mean_difference(pairs, (best, kind))
    start, end = told["zero-shot"], told["centralised"]
    if start is not None and end is not None and end > start:
        told["share"] = (told["score"] - start) / (end - start)
    return told
