"""Linear contrasts of cell means, and the verdict on a claim that one or several of them are above zero.

A contrast is Σ_p a_p Σ_m w_m μ_mp: weights w_m of a grid's cells m, and weights a_p of its places p. Cells are paired within a
replicate and places are independent, so the contrast is the mean of a replicate's weighted scores, and `protocol.summary` has
its variance and degrees of freedom: Σ a_p² s_p² / R_p by Satterthwaite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from fedmllm.report.protocol import LEVEL, Comparison, Resamples, Units, common_term, regrouped, summary


class Contrast(NamedTuple):
    """What a claim says is above zero: the weight of each cell, the weight of each place, and how a page names it."""

    label: str
    cells: Mapping[str, float]
    places: Mapping[str, float]


Verdict = Literal["supported", "refuted", "no effect", "undecided", "not run"]


def estimate(
    contrast: Contrast, scores: Mapping[str, Units], resamples: Mapping[str, Resamples] | None = None, averaged: bool = False
) -> Comparison:
    """The contrast of `scores`, by cell. `resamples` of each cell, if all units share one test set; `averaged`, if the places
    have the same draws, so that a unit is one replicate at all of them.

    `worst` is the contrast with the lowest single unit instead of the means of the places with a positive weight: for a
    difference of cells, that of the worst replicate. If the weights differ and a place has one unit, there is no interval.
    """
    units = _combined(contrast, scores, averaged)
    c = common_term(_combined(contrast, resamples, averaged)) if resamples else 0.0
    overall = summary(units, c)
    known = {place: [x for x in at.values() if math.isfinite(x)] for place, at in units.items()}
    if averaged or overall.lost or not overall.units:
        return overall
    if len(set(contrast.places.values())) > 1 and min(map(len, known.values())) < 2:
        n = math.nan
        overall = replace(overall, low=n, high=n, p=n, se=n, df=n, mde=n, margin=n)
    count = len(contrast.places)
    positive = {place: count * weight for place, weight in contrast.places.items() if weight > 0}
    lowest = min(min(known[place]) / weight for place, weight in positive.items())
    below = sum(np.mean(known[place]) for place, weight in contrast.places.items() if weight < 0)
    return replace(overall, worst=float(lowest * sum(positive.values()) + below) / count)


def _combined(contrast: Contrast, of_cells: Mapping[str, Mapping[str, Mapping[str, Any]]], averaged: bool) -> dict[str, Any]:
    """place -> unit -> the weighted scores or resamples, so that their mean over the places is the contrast."""
    combined: dict[str, dict[str, Any]] = {}
    for place, weight in contrast.places.items():
        at = {cell: of_cells[cell].get(place, {}) for cell in contrast.cells}
        names = dict.fromkeys(unit for units in at.values() for unit in units)
        combined[place] = {
            unit: len(contrast.places) * weight * sum(w * at[cell].get(unit, math.nan) for cell, w in contrast.cells.items())
            for unit in names
        }
    return regrouped(combined, list(contrast.places)) if averaged else combined


@dataclass(frozen=True)
class Judgement:
    """The verdict on a claim; `p` is two-sided, of support or refutation, and NaN without a test. `weakest` is the index of the
    contrast that is the least above zero. `small` says that two one-sided tests exclude effects beyond ±margin."""

    verdict: Verdict
    p: float
    weakest: int
    small: bool


def judge(contrasts: Sequence[Comparison], margin: float) -> Judgement:
    """The verdict on the claim that each of the k contrasts is above zero; `margin` as a share of 1.

    Supported if the 95 % interval of each is above zero, which is an intersection-union test (Berger 1982) and needs no
    correction. Refuted if some interval at 1 − 5 %/k is below zero. No effect if each 90 % interval is within ±margin.
    """
    above = [c.p / 2 if c.estimate > 0 else 1 - c.p / 2 for c in contrasts]  # one-sided p of each being above zero
    unknown = next((index for index, p in enumerate(above) if math.isnan(p)), None)
    if unknown is not None:
        return Judgement("undecided", math.nan, unknown, False)
    weakest = int(np.argmax(above))
    support, refutation = min(1.0, 2 * above[weakest]), min(1.0, 2 * len(above) * (1 - above[weakest]))
    small = all(c.margin <= margin for c in contrasts)
    verdict: Verdict = "no effect" if small else "undecided"
    if min(support, refutation) < LEVEL:
        verdict = "supported" if support < refutation else "refuted"
    return Judgement(verdict, min(support, refutation), weakest, small)
