"""How far federating goes: at each place of a grid the best federated method between the baselines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmllm.report.grids import place_of
from fedmllm.report.significance import Takings, difference

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


def ways(taken: Takings, grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{"place", "best", "score", kind: score, "above": {kind: {"difference", "ci"}}, "share"} of each place that has a
    federated method and a baseline.

    `best` is the federated method with the highest mean at that place: chosen by what is then told of it, so its lead is
    flattered. `above` has zero-shot and local with paired 95 % intervals over the test samples; `share` is (best − zero-shot) /
    (centralised − zero-shot), None where centralised is not above zero-shot.
    """
    axis = method_axis(grid)
    if axis is None:
        return []
    places: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in grid["rows"]:
        if row["ids"]:
            places.setdefault(place_of(row, axis), []).append(row)
    found = []
    for place, rows in places.items():
        base = {row["kind"]: row for row in rows if row["kind"] in BASELINES}
        federated = [row for row in rows if row["kind"] == "federated"]
        if not base or not federated:
            continue
        best = max(federated, key=lambda row: row["mean"])
        name = best["axes"][axis]
        told: dict[str, Any] = {"place": place, "best": name, "score": best["mean"], "above": {}, "share": None}
        told |= {kind: base[kind]["mean"] if kind in base else None for kind in BASELINES}
        for kind in BASELINES[:2]:
            if kind in base:
                told["above"][kind] = difference(taken(best), taken(base[kind]), (name, kind))
        if "zero-shot" in base and "centralised" in base and base["centralised"]["mean"] > base["zero-shot"]["mean"]:
            start = base["zero-shot"]["mean"]
            told["share"] = (best["mean"] - start) / (base["centralised"]["mean"] - start)
        found.append(told)
    return found
