"""What a comparison shows, in the sentences that a page prints. Shares are told as points, 100 × share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedmllm.report.protocol import LEVEL, Comparison


def points(share: float, sign: str = "+") -> str:
    """ "+3.2", and "–" for NaN. Never "-0.0"."""
    return "–" if math.isnan(share) else f"{round(100 * share, 1) + 0.0:{sign}.1f}"


def p_value(p: float) -> str:
    """ "p = 0.012", "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def conclusion(comparison: Comparison, ours: str, baseline: str, p: float, declared: float | None = None) -> str:
    """What holds of ours and the baseline; `p` is corrected for the number of comparisons (Holm).

    `declared` is the largest difference, as a share, that was said beforehand to count as none. A difference can be both
    significant and smaller than that; then both are said.
    """
    if math.isnan(comparison.p):
        return untested(comparison, ours, baseline)
    sentences = [superiority(comparison, ours, baseline, p)] if p < LEVEL else []
    if declared is not None and comparison.margin <= declared:
        sentences.append(equivalence(comparison, ours, baseline, declared))
    return " ".join(sentences) or undecided(comparison, ours, baseline, p)


def superiority(comparison: Comparison, ours: str, baseline: str, p: float) -> str:
    """ "FedX is above BASE by 2.1 points [0.5, 3.7] over 4 settings, 20 replicates (p = 0.012)." """
    side, sign = ("above", 1) if comparison.estimate > 0 else ("below", -1)
    low, high = sorted([sign * comparison.low, sign * comparison.high])
    interval = f"[{points(low, '')}, {points(high, '')}]"
    over = f"over {counted(comparison.places, 'setting')}, {counted(comparison.units, 'replicate')}"
    return f"{ours} is {side} {baseline} by {points(abs(comparison.estimate), '')} points {interval} {over} ({p_value(p)})."


def equivalence(comparison: Comparison, ours: str, baseline: str, declared: float) -> str:
    return (
        f"{ours} against {baseline}: no effect larger than ±{points(declared, '')} points (two one-sided tests, 5 %); "
        f"one of {points(comparison.mde, '')} would have been found with a probability of 80 %."
    )


def undecided(comparison: Comparison, ours: str, baseline: str, p: float) -> str:
    return (
        f"{ours} against {baseline} is undecided ({p_value(p)}): effects from {points(comparison.low)} to "
        f"{points(comparison.high)} points fit; only {points(comparison.mde, '')} or more would be found with a probability of "
        "80 %."
    )


def untested(comparison: Comparison, ours: str, baseline: str) -> str:
    """Without a p: no common replicate, or what `why_untested` says."""
    if comparison.units == 0:
        return f"{ours} and {baseline} have no replicate in common."
    gap = f"{ours} against {baseline}: {points(comparison.estimate)} points in {counted(comparison.units, 'replicate')}"
    return f"{gap}; no test: {why_untested(comparison)}."


def why_untested(comparison: Comparison) -> str:
    """Why a comparison of at least one replicate has no p."""
    if comparison.se == 0:
        return "all replicates have the same difference"
    if math.isnan(comparison.common):
        return "fewer than two resamples of the common test set give every replicate a score"
    return "a test needs two replicates at each place"


def best_set(names: Sequence[str]) -> str:
    return f"Not beaten by any other: {', '.join(names)}."


def remarks(comparison: Comparison, ours: str, baseline: str) -> list[str]:
    """What a reader should know of the replicates behind a comparison."""
    lines = []
    if comparison.dropped:
        lines.append(f"Left out: {counted(comparison.dropped, 'replicate')} that {ours} or {baseline} lacks.")
    if comparison.lost:
        lines.append(f"Without a common replicate: {', '.join(comparison.lost)}.")
    if comparison.dominant is not None:
        lines.append(f"Over half of the variance comes from {comparison.dominant}.")
    return lines


def counted(number: int, noun: str) -> str:
    """ "1 setting", "4 settings"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
