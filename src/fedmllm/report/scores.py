"""Means over seeds, and the one way in which a score is printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

UNKNOWN = "–"
NO_SAMPLES = "no such samples"
"""In place of a score under a pattern that no test sample has."""


@dataclass(frozen=True)
class Spread:
    """The mean and sample standard deviation over seeds, None if they are unknown."""

    mean: float | None = None
    sd: float | None = None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        """Unknown if a value is None or NaN, or if there is none; the s.d. is also unknown for a single value."""
        known = [value for value in values if value is not None and not math.isnan(value)]
        if not known or len(known) < len(values):
            return cls()
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)

    def to_json(self) -> dict[str, float | None]:
        return {"mean": self.mean, "sd": self.sd}


NO_SPREAD = Spread()


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None if a value is unknown: a mean over the remaining ones would not be comparable."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def score(spread: Spread | None, missing: int = 0) -> str:
    """ "71.3 ± 0.8" in percent, with a star if runs are `missing`, or a dash if the mean is unknown."""
    if spread is None or spread.mean is None:
        return UNKNOWN
    sd = f" ± {100 * spread.sd:.1f}" if spread.sd is not None else ""
    return f"{100 * spread.mean:.1f}{sd}" + ("*" if missing else "")
