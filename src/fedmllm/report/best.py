"""Which method is the best? The set that no other beats, and a score of the best that is not flattered by its choice.

The highest of several means is too high as an estimate: for five equal methods, three replicates and an s.d. of 6, by 4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedmllm.report.protocol import LEVEL, Floats, Resamples, Units, common_term, compare, summary


@dataclass(frozen=True)
class Best:
    """The method with the highest mean, and its cross-fitted `score`: chosen on the other units, read on the one left out.

    `low` and `high` bound the mean of `method` at 1 − 0.05/k, so that they hold whichever of the k methods was chosen.
    """

    method: str
    score: float
    low: float
    high: float


def not_beaten(scores: Mapping[str, Units], resamples: Mapping[str, Resamples] | None = None) -> list[str]:
    """The methods that no other beats in paired one-sided tests at 5 %/(k − 1): a set that holds the best one with 95 %.

    `resamples` of each method, if all units share one test set. A pair without a p (a single unit) beats nobody.
    """
    names, beaten = list(scores), set()
    for first, second in itertools.combinations(names, 2):
        c = common_term(resamples[first], resamples[second]) if resamples else 0.0
        pair = compare(scores[first], scores[second], c)
        if pair.p / 2 < LEVEL / (len(names) - 1):
            beaten.add(second if pair.estimate > 0 else first)
    return [name for name in names if name not in beaten]


def cross_fitted(scores: Mapping[str, Units], resamples: Mapping[str, Resamples] | None = None) -> Best | None:
    """The best of k methods over the units that all of them have; None without such a unit, NaN scores with a single one.

    `resamples` of each method, if all units share one test set. The score then still has the luck of that test set.
    """
    names, places = list(scores), _common_units(scores)
    if not places:
        return None
    means = {place: units.mean(axis=0) for place, units in places.items()}
    best = int(np.argmax(np.mean(list(means.values()), axis=0)))
    left_out = [_left_out(units, [means[other] for other in means if other != place]) for place, units in places.items()]
    of_best = {place: {str(i): float(score) for i, score in enumerate(units[:, best])} for place, units in places.items()}
    c = common_term(resamples[names[best]]) if resamples else 0.0
    mean = summary(of_best, c, level=1 - LEVEL / len(names))
    return Best(names[best], float(np.mean(left_out)), mean.low, mean.high)


def _left_out(units: Floats, other_places: list[Floats]) -> float:
    """The mean over a place's units (R_p, k) of the score there of the method that is the best on all other units."""
    if len(units) > 1:
        means = (units.sum(axis=0) - units) / (len(units) - 1) + sum(other_places)
    elif other_places:
        means = np.sum(other_places, axis=0, keepdims=True)
    else:
        return math.nan
    return float(np.take_along_axis(units, means.argmax(axis=1, keepdims=True), axis=1).mean())


def _common_units(scores: Mapping[str, Units]) -> dict[str, Floats]:
    """(R_p, k) the scores of all methods in the units that all of them have, without the places that have no such unit."""
    places: dict[str, Floats] = {}
    for place, of_first in next(iter(scores.values()), {}).items():
        rows = np.array(
            [[of[place].get(unit, math.nan) if place in of else math.nan for of in scores.values()] for unit in of_first]
        )
        known = rows[np.isfinite(rows).all(axis=1)] if len(rows) else rows
        if len(known):
            places[place] = known
    return places
