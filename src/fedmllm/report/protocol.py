"""The protocol of comparison: paired differences per replicate, a t test stratified by place, and what follows from it.

A *place* is a named setting of a chapter, for instance one kind of heterogeneity. Its *units* are replicates: independent draws
of the seed and of training and test samples, each used by every method. Units are averaged within a place, then places with
equal weight; the standard error comes from the spread of units within places. Scores and differences are shares of 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit  # scipy.stats.t calls them and takes three times as long to import

from fedmllm.errors import ConfigError

Floats = NDArray[np.float64]
Units = Mapping[str, Mapping[str, float]]
"""Place → unit → score. A score that is not finite is a missing unit."""
Resamples = Mapping[str, Mapping[str, Floats]]
"""Place → unit → scores (draws,) on resamples of the test set; draw b is the same resample for all units and methods."""

LEVEL = 0.05
POWER = 0.8
_ZERO = 1e-12
"""A standard error below this is the rounding of differences that are the same in every unit."""


@dataclass(frozen=True)
class Comparison:
    """A minus B over the places of a chapter. What is not defined is NaN.

    `low` and `high` bound the interval; `p` is two-sided, under no difference. `mde` is the minimum detectable effect: 80 %
    power at 5 %. `margin` is the far end of the 90 % interval: two one-sided tests at 5 % exclude a larger difference.
    `dropped` counts the units that one side lacks, `lost` names the places without a common unit. `worst` is the difference in
    the worst unit. `dominant` is the place that has over half of the variance. `common` is c, see `common_term`.
    """

    estimate: float
    low: float
    high: float
    p: float
    se: float
    df: float
    mde: float
    margin: float
    units: int
    places: int
    dropped: int
    lost: tuple[str, ...]
    worst: float
    dominant: str | None
    common: float

    @property
    def sd(self) -> float:
        """The standard deviation of a unit that gives the standard error, c included, with this number of units: if all places
        have as many and c = 0, the root of the mean variance within a place."""
        return self.se * math.sqrt(self.units)


def differences(ours: Mapping[str, Mapping[str, Any]], theirs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By place and unit, NaN where one side lacks the unit."""
    differences: dict[str, dict[str, Any]] = {}
    for place in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(place, {}), theirs.get(place, {})
        differences[place] = {unit: a.get(unit, math.nan) - b.get(unit, math.nan) for unit in dict.fromkeys([*a, *b])}
    return differences


def _known(units: Mapping[str, Mapping[str, Any]]) -> dict[str, Floats]:
    """(R_p, …) the values of each place's units that are not missing, without the places that have none."""
    places = {place: np.array(list(of_place.values()), dtype=np.float64) for place, of_place in units.items() if of_place}
    known = {place: values[np.isfinite(values).reshape(len(values), -1).any(axis=1)] for place, values in places.items()}
    return {place: values for place, values in known.items() if len(values)}


def _strata(places: Mapping[str, Floats]) -> list[Floats]:
    """(R_p, …) the units of each place; if a place has a single unit, the means of the places are the units of one stratum."""
    if len(places) > 1 and min(map(len, places.values())) == 1:
        return [np.array([values.mean(axis=0) for values in places.values()])]
    return list(places.values())


def _mean(strata: Sequence[Floats]) -> float:
    return float(np.mean([values.mean() for values in strata])) if strata else math.nan


class _Part(NamedTuple):
    """A part of the variance of an estimate, with its degrees of freedom; `place` is None where it is not that of one place."""

    variance: float
    freedom: int
    place: str | None = None


def _parts(strata: Sequence[Floats], places: Sequence[str] = ()) -> list[_Part]:
    """v_p / P² for each stratum, where v_p = s_p² / R_p; NaN for a single unit."""
    names = places if len(places) == len(strata) > 1 else [None] * len(strata)
    variances = [float(values.var(ddof=1)) / len(values) if len(values) > 1 else math.nan for values in strata]
    return [_Part(v / len(strata) ** 2, len(s) - 1, name) for v, s, name in zip(variances, strata, names, strict=True)]


def _comparison(
    estimate: float, parts: Sequence[_Part], c: float, level: float, places: Mapping[str, Floats], asked: Units
) -> Comparison:
    """Degrees of freedom by Satterthwaite (1946), as if c were known: (V + c)² / Σ (v_p / P²)² / (R_p − 1)."""
    within = sum(part.variance for part in parts) if parts else math.nan
    se, df, reach, p, mde, margin = math.sqrt(within + c), math.nan, math.nan, math.nan, math.nan, math.nan
    if se < _ZERO:
        se = 0.0
    elif se > 0:
        spread = sum(part.variance**2 / part.freedom for part in parts)
        df = (within + c) ** 2 / spread if spread else math.inf
        reach, two_sided, power, one_sided = se * stdtrit(df, [(1 + level) / 2, 1 - LEVEL / 2, POWER, 1 - LEVEL])
        p, mde, margin = 2 * float(stdtr(df, -abs(estimate) / se)), two_sided + power, abs(estimate) + one_sided
    differences = np.concatenate([*places.values(), np.empty(0)])
    return Comparison(
        estimate, float(estimate - reach), float(estimate + reach), p, se, df, float(mde), float(margin),
        units=len(differences),
        places=len(places),
        dropped=sum(map(len, asked.values())) - len(differences),
        lost=tuple(place for place in asked if place not in places),
        worst=float(differences.min()) if len(differences) else math.nan,
        dominant=next((part.place for part in parts if se > 0 and part.variance > within / 2), None),
        common=c,
    )  # fmt: skip


def summary(differences: Units, c: float = 0.0, level: float = 1 - LEVEL) -> Comparison:
    """The mean of differences, or of a single method's scores, with its interval.

    If a place has a single unit and there are several places, the test is over the places' means, with P − 1 degrees of
    freedom. A single unit gives its number alone; no unit gives NaN.
    """
    places = _known(differences)
    strata = _strata(places)
    return _comparison(_mean(strata), _parts(strata, list(places)), c, level, places, differences)


def compare(ours: Units, baseline: Units, c: float = 0.0, level: float = 1 - LEVEL) -> Comparison:
    """Ours minus the baseline, paired by place and unit; `c` is `common_term` if all units share one test set."""
    return summary(differences(ours, baseline), c, level)


def common_term(ours: Resamples, baseline: Resamples | None = None) -> float:
    """c, the variance of the mean difference (without a baseline, of the mean) that comes from one test set for all units.

    For one place it is max(0, (U·W − m)/(U − 1)), the mean covariance of two units: U units, W the variance over resamples of
    the mean difference, m the mean of the single units' variances. For P places, in the same way for each of them,
    W − Σ_p (m_p − W_p)/(R_p − 1)/P². 0 with fewer than two units; NaN if
    fewer than two resamples give all units a score.
    """
    strata = _strata(_known(ours if baseline is None else differences(ours, baseline)))
    if not strata or min(map(len, strata)) < 2:
        return 0.0
    # A resample on which some unit has no score, for instance AUC without positives, is left out of all.
    defined = np.all([np.isfinite(values).all(axis=0) for values in strata], axis=0)
    if defined.sum() < 2:
        return math.nan
    strata = [values[:, defined] for values in strata]
    means = np.array([values.mean(axis=0) for values in strata])
    own = [float(values.var(axis=1, ddof=1).mean() - values.mean(axis=0).var(ddof=1)) / (len(values) - 1) for values in strata]
    return max(0.0, float(means.mean(axis=0).var(ddof=1)) - sum(own) / len(strata) ** 2)


def regrouped(units: Mapping[str, Mapping[str, Any]], places: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Units that are means over `places`, for archives in which one draw or one run serves several places; scores or resamples.

    A unit that lacks one of the places is left out, since its mean would be that of other places.
    """
    names = dict.fromkeys(unit for place in places for unit in units.get(place, {}))
    complete = [unit for unit in names if all(unit in units.get(place, {}) for place in places)]
    return {"all places": {unit: np.mean([units[place][unit] for place in places], axis=0) for unit in complete}}


def holm(ps: Sequence[float]) -> list[float]:
    """The p values corrected for their number (Holm 1979), in their order; NaN stays NaN and is not counted."""
    corrected, least = [math.nan] * len(ps), 0.0
    known = sorted((index for index, p in enumerate(ps) if not math.isnan(p)), key=lambda index: ps[index])
    for rank, index in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * float(ps[index])))
        corrected[index] = least
    return corrected


def place_variances(ours: Units, baseline: Units) -> dict[str, float]:
    """s_p², the variance of a pilot's paired differences, for each place that has two units or more."""
    known = _known(differences(ours, baseline))
    return {place: float(values.var(ddof=1)) for place, values in known.items() if len(values) > 1}


def replicates_needed(variances: Sequence[float], effect: float, power: float = POWER, c: float = 0.0) -> int:
    """The least number of replicates at each place with which a difference of `effect` is found with `power` at 5 %.

    `variances` (P,) are those of the places' paired differences, see `place_variances`. At least 2. Raises ConfigError if
    no number is enough, since `c` does not shrink with it.
    """
    if not (effect > 0 and 0.5 <= power < 1 and len(variances)):
        raise ConfigError(
            "planning needs an effect above 0, a power from 0.5 to 1, and a pilot with two replicates at some place."
        )
    parts = np.asarray(variances, dtype=np.float64) / len(variances) ** 2
    least = (effect / (stdtrit(math.inf, 1 - LEVEL / 2) + stdtrit(math.inf, power))) ** 2  # the largest SE², at infinite df
    if c >= least:
        raise ConfigError(
            f"no number of replicates finds {100 * effect:g} points on one fixed test set: draw test samples anew for each "
            "replicate, or plan for a larger effect."
        )
    replicates: int = max(2, math.ceil(float(parts.sum()) / (least - c)))
    while parts.any():
        variance = float(parts.sum()) / replicates + c
        df = variance**2 * (replicates - 1) / float(np.square(parts / replicates).sum())
        if (stdtrit(df, 1 - LEVEL / 2) + stdtrit(df, power)) * math.sqrt(variance) <= effect:
            break
        replicates += 1
    return replicates
