"""What did not work in a grid, in plain sentences, each computed from its runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fedmllm.report.grids import Grid, GridRow, place_of
from fedmllm.report.significance import Significance

LEVEL = 0.05


def _below(rows: Sequence[GridRow], kind: str, tests: Significance) -> list[str]:
    """Federated methods below the cells of `kind` at the same places: at how many, how significantly, and by how much."""
    base = [(row, row.spread.mean) for row in rows if row.kind == kind and row.spread.mean is not None]
    axis = next((a for a in (base[0][0].axes if base else ()) if len({row.axes[a] for row, _ in base}) == 1), None)
    if axis is None:
        return []
    at = {place_of(row.axes, axis): mean for row, mean in base}
    comparisons = tests.comparisons if tests.baseline == base[0][0].axes[axis] else []
    significant = [tuple(c.axes.values()) for c in comparisons if c.difference < 0 and c.p_holm < LEVEL]
    gaps: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        place = place_of(row.axes, axis)
        if row.kind == "federated" and row.spread.mean is not None and place in at:
            gaps.setdefault(row.axes[axis], []).append((" · ".join(place), row.spread.mean - at[place]))
    sentences = []
    for name, of_method in gaps.items():
        if below := [(place, gap) for place, gap in of_method if gap < 0]:
            worst, points = min(below, key=lambda pair: pair[1])
            where = f"worst {f'at {worst} ' if worst else ''}by {-100 * points:.1f} points"
            count = f" (significantly in {sum(name in cell for cell in significant)})" if comparisons else ""
            sentences.append(f"{name} is below {kind} in {len(below)} of {len(of_method)} places{count}, {where}.")
    return sentences


def _least_p(places: int) -> float:
    """The least p of the sign-flip test: all differences have the same sign."""
    return 2 * 0.5**places


def _overall(tests: Significance) -> list[str]:
    """Methods that are not significantly better than the baseline over the places."""
    sentences = []
    places = max((comparison.places for comparison in tests.overall), default=0)
    if places > 1 and (least := _least_p(places)) > LEVEL:  # one sentence instead of one per method
        sentences.append(
            f"Over {places} places together nothing can be significant (p is at least {least:.3g}, however large the "
            "difference): see the single places."
        )
    for comparison in tests.overall:
        name, points = comparison.name, f"{100 * comparison.difference:+.1f} points"
        if _least_p(comparison.places) > LEVEL:
            continue
        if not comparison.p_holm < LEVEL:
            sentences.append(
                f"{name} is not significantly different from {tests.baseline} over all places: {points}, "
                f"p = {comparison.p_holm:.3f}."
            )
        elif comparison.difference < 0:
            sentences.append(f"{name} is significantly worse than {tests.baseline}: {points}, p = {comparison.p_holm:.3g}.")
    return sentences


def verdicts(grid: Grid, tests: Significance) -> list[str]:
    """Sentences about a grid: methods below the baselines, differences that are not significant over the places, seeds that
    disagree, scores far from a known ceiling, cells without a run."""
    rows = grid.rows
    sentences = [line for kind in ("zero-shot", "local") for line in _below(rows, kind, tests)] + _overall(tests)
    deviations = [(row.spread.sd, row) for row in rows if row.spread.sd is not None]
    if deviations:
        typical = statistics.median(sd for sd, _ in deviations)
        widest, row = max(deviations, key=lambda pair: pair[0])
        sentences.append(
            f"Seeds disagree by {100 * typical:.1f} points (the median s.d. of a cell), at most {100 * widest:.1f} "
            f"({' · '.join(row.axes.values())}); differences of that size mean little."
        )
    bounded = [(row.spread.mean, row) for row in rows if row.spread.mean is not None and row.pattern in row.ceiling]
    if bounded:
        mean, best = max(bounded, key=lambda pair: pair[0])
        gap = best.ceiling[best.pattern] - mean
        sentences.append(
            f"The best cell ({' · '.join(best.axes.values())}) is {100 * gap:.1f} points under what can be reached."
        )
    if incomplete := [row for row in rows if row.missing]:
        names = "; ".join(" · ".join(row.axes.values()) for row in incomplete[:5])
        sentences.append(f"{len(incomplete)} cells lack runs: {names}{'; …' if len(incomplete) > 5 else ''}.")
    return sentences or ["Nothing that these figures show."]
