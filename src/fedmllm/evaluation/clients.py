"""What each client can expect of a model, given the modalities that its own samples have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedmllm.data.manifest import Manifest

COLUMNS = ("both", "image", "text")
"""The test patterns in the order of `Manifest.patterns`."""


def client_scores(
    manifest: Manifest, metrics: Mapping[str, Mapping[str, Any]], rows: Sequence[dict[str, Any]], metric: str
) -> list[float]:
    """One score a client that holds something, and the same as `score` in its row.

    It is the mean of the metric over the test patterns, each weighted by how many of the client's samples look like it: a
    client of 30 paired samples and 10 pictures has 0.75 · both + 0.25 · image. Where a client has a model of its own, that
    model's `metrics` in its row count, and clients without are left out. Nothing where a pattern was not tested that a client
    needs, or has no value.
    """
    counts = manifest.patterns()
    own = any("metrics" in row for row in rows)
    of = {row["client"]: row["metrics"] for row in rows if "metrics" in row}
    clients = [c for c in np.flatnonzero(counts.sum(axis=1)).tolist() if not own or c in of]
    scores: dict[int, float] = {}
    for client in clients:
        found = [of.get(client, metrics).get(pattern, {}).get(metric, math.nan) for pattern in COLUMNS]
        needed = [(int(n), value) for n, value in zip(counts[client], found, strict=True) if n]
        scores[client] = sum(n * value for n, value in needed) / sum(n for n, _ in needed)
    if any(math.isnan(score) for score in scores.values()):
        return []
    if len(rows) == manifest.clients:  # centralised training has one row, for the pool
        for row in rows:
            if row["client"] in scores:
                row["score"] = round(scores[row["client"]], 6)
    return list(scores.values())


def fairness(scores: Sequence[float]) -> dict[str, Any]:
    """{"n", "mean", "sd", "worst_decile"} over clients, the last over the lowest tenth, rounded up; empty without any."""
    if not scores:
        return {}
    low = sorted(scores)[: math.ceil(len(scores) / 10)]
    values = {"mean": np.mean(scores), "sd": np.std(scores), "worst_decile": np.mean(low)}
    return {"n": len(scores), **{name: round(float(value), 6) for name, value in values.items()}}
