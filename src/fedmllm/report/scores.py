"""Means over seeds, and the one way in which a score is printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

UNKNOWN = "–"


@dataclass(frozen=True)
class Spread:
    """The mean and sample standard deviation over seeds. The mean is None without values, the s.d. with fewer than two."""

    mean: float | None = None
    sd: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(mean(values), statistics.stdev(values) if len(values) > 1 else None)

    @classmethod
    def of_known(cls, values: Sequence[float | None]) -> Spread:
        """The spread of `values`, unknown if any of them is None or NaN."""
        known = [value for value in values if value is not None and not math.isnan(value)]
        return cls.of(known) if len(known) == len(values) else cls()

    def to_json(self) -> dict[str, float | None]:
        return {"mean": self.mean, "sd": self.sd}


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
