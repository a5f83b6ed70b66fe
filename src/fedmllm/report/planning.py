"""How many replicates a sweep needs, from the spread of a pilot's runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from fedmllm.errors import RunError
from fedmllm.report.comparisons import axis_of, rows_by_method
from fedmllm.report.grids import read_grid
from fedmllm.report.protocol import place_variances, replicates_needed
from fedmllm.report.units import UnitReader

DRAW_FACTOR = 1.2
"""What a draw of training data of its own adds to the s.d. of runs that share their data, as measured on the offline grids."""


@dataclass(frozen=True)
class Plan:
    """The replicates with which a method's difference from the baseline would be found. `sd` is the root of the mean variance
    of the differences within a place, as a share of 1; `hours` is the time of that many replicates of the whole sweep."""

    method: str
    places: int
    sd: float
    replicates: int
    hours: float

    def to_json(self) -> dict[str, Any]:
        return self.__dict__


def plan_replicates(pilot: Path, baseline: str, effect: float, power: float, kinds: Sequence[str]) -> list[Plan]:
    """One plan per method of the pilot's sweep, for an `effect` as a share of 1. `kinds` are those of one replicate's runs.

    Raises RunError if the pilot has no such cell or no method with two units at a place, ConfigError for an impossible effect.
    """
    grid, reader = read_grid(pilot), UnitReader(pilot)
    known = [row for row in grid.rows if row.seconds is not None]
    seconds = {kind: fmean([row.seconds or 0.0 for row in known if row.kind == kind] or [math.nan]) for kind in set(kinds)}
    hours = sum(seconds[kind] for kind in kinds) / 3600
    methods, plans = rows_by_method(grid, axis_of(grid, baseline, pilot)), []
    for name, rows in methods.items():
        if name == baseline:
            continue
        by_place = {
            p: place_variances(*reader.scores(row, methods[baseline][p])) for p, row in rows.items() if p in methods[baseline]
        }
        factor = 1.0 if any(row.draws for row in rows.values()) else DRAW_FACTOR**2
        variances = [factor * variance for of_place in by_place.values() for variance in of_place.values()]
        if variances:
            replicates = replicates_needed(variances, effect, power)
            plans.append(Plan(name, len(variances), math.sqrt(fmean(variances)), replicates, replicates * hours))
    if not plans:
        raise RunError(f"{pilot}: no method has two replicates at a place that {baseline!r} also has; run a larger pilot.")
    return plans


def plan_table(plans: Sequence[Plan], baseline: str, effect: float, power: float) -> Table:
    title = f"replicates to find {100 * effect:g} points from {baseline} with {100 * power:g} %"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for heading in ("places", "s.d. of a difference", "replicates", "hours"):
        table.add_column(heading, justify="right")
    for plan in plans:
        hours = "unknown" if math.isnan(plan.hours) else f"{plan.hours:.1f}"
        table.add_row(plan.method, str(plan.places), f"{100 * plan.sd:.1f}", str(plan.replicates), hours)
    return table
