"""What did not work in a grid, in plain sentences, each computed from its runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedmllm.report.grids import place_of

LEVEL = 0.05


def _below(rows: Sequence[Mapping[str, Any]], kind: str, tested: Mapping[str, Any]) -> list[str]:
    """Federated methods under the cells of `kind` at the same places: in how many, how surely, and by how much."""
    base = [row for row in rows if row["kind"] == kind and row["mean"] is not None]
    axis = next((a for a in (base[0]["axes"] if base else ()) if len({row["axes"][a] for row in base}) == 1), None)
    if axis is None:
        return []
    at = {place_of(row, axis): row["mean"] for row in base}
    known = tested["comparisons"] if tested["baseline"] == base[0]["axes"][axis] else []
    sure = [tuple(one["axes"].values()) for one in known if one["difference"] < 0 and one["p_holm"] < LEVEL]
    found: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        if row["kind"] == "federated" and row["mean"] is not None and place_of(row, axis) in at:
            gap = row["mean"] - at[place_of(row, axis)]
            found.setdefault(row["axes"][axis], []).append((" · ".join(place_of(row, axis)), gap))
    told = []
    for name, gaps in found.items():
        if under := [(place, gap) for place, gap in gaps if gap < 0]:
            worst, points = min(under, key=lambda pair: pair[1])
            where = f"worst {f'at {worst} ' if worst else ''}by {-100 * points:.1f} points"
            surely = f" (significantly in {sum(name in cell for cell in sure)})" if known else ""
            told.append(f"{name} is below {kind} in {len(under)} of {len(gaps)} places{surely}, {where}.")
    return told


def _least_p(places: int) -> float:
    """Of the test by signs: all differences on one side, or all on the other."""
    return 2 * 0.5**places


def verdicts(grid: Mapping[str, Any], tested: Mapping[str, Any]) -> list[str]:
    """Sentences about a grid of `read_grid` and what `against` found: methods below the baselines, differences that are not
    significant over the places, seeds that disagree, scores far from a known ceiling, cells without a run."""
    rows = grid["rows"]
    told = [line for kind in ("zero-shot", "local") for line in _below(rows, kind, tested)]
    places = max((one["places"] for one in tested["overall"]), default=0)
    if places > 1 and (least := _least_p(places)) > LEVEL:  # a sentence a method would say this alone, again and again
        told.append(
            f"Over {places} places together nothing can be significant (p is at least {least:.3g}, however large the "
            "difference): see the single places."
        )
    for one in tested["overall"]:
        name, base = one[tested["axis"]], tested["baseline"]
        if _least_p(one["places"]) > LEVEL:
            continue
        if not one["p_holm"] < LEVEL:
            told.append(
                f"{name} is not significantly different from {base} over all places: {100 * one['difference']:+.1f} points, "
                f"p = {one['p_holm']:.3f}."
            )
        elif one["difference"] < 0:
            told.append(
                f"{name} is significantly worse than {base}: {100 * one['difference']:+.1f} points, p = {one['p_holm']:.3g}."
            )
    spreads = [(row["sd"], row) for row in rows if row["sd"] is not None]
    if spreads:
        typical = statistics.median(sd for sd, _ in spreads)
        widest, row = max(spreads, key=lambda pair: pair[0])
        told.append(
            f"Seeds disagree by {100 * typical:.1f} points (the median s.d. of a cell), at most {100 * widest:.1f} "
            f"({' · '.join(row['axes'].values())}); differences of that size mean little."
        )
    known = [row for row in rows if row["mean"] is not None and row.get("pattern") in row.get("ceiling", {})]
    if known:
        best = max(known, key=lambda row: row["mean"])
        gap = best["ceiling"][best["pattern"]] - best["mean"]
        told.append(f"The best cell ({' · '.join(best['axes'].values())}) is {100 * gap:.1f} points under what can be reached.")
    if absent := [row for row in rows if row["missing"]]:
        names = "; ".join(" · ".join(row["axes"].values()) for row in absent[:5])
        told.append(f"{len(absent)} cells lack runs: {names}{'; …' if len(absent) > 5 else ''}.")
    return told or ["Nothing that these figures show."]
