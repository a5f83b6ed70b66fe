"""The score that each client can expect of a model, given the modalities of its own samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedmllm.data.manifest import Manifest

COLUMNS = ("both", "image", "text")
"""The test patterns in the order of `Manifest.patterns`, whose last column, samples that show neither, has no test pattern."""

MODALITY_GROUPS = ("paired", "image only", "text only", "mixed", "neither")
"""What a client's samples show: all of them both modalities, the image, the text, one or the other or both, or nothing."""


def modality_group(row: Mapping[str, Any]) -> str:
    """Which of the MODALITY_GROUPS a client belongs to, from its row in `per_client`."""
    shown = {name: row[name] / row["samples"] if row["samples"] else 0.0 for name in ("image", "text")}
    pure = {(1.0, 1.0): "paired", (1.0, 0.0): "image only", (0.0, 1.0): "text only", (0.0, 0.0): "neither"}
    return pure.get((shown["image"], shown["text"]), "mixed")


def client_scores(
    manifest: Manifest, metrics: Mapping[str, Mapping[str, Any]], rows: Sequence[dict[str, Any]], metric: str
) -> list[float]:
    """One score per client that sees a modality; each is also written to `score` in the client's row.

    A score is the mean of the metric over the test patterns, weighted by the number of the client's samples that show each
    pattern: a client with 30 paired samples and 10 pictures has 0.75 · both + 0.25 · image. If any row has the `metrics` of a
    personal model, these are used, and clients without a personal model are left out. Returns an empty list if a pattern that
    a client needs was not tested or has no value.
    """
    counts = manifest.patterns()[:, : len(COLUMNS)]
    personal = {row["client"]: row["metrics"] for row in rows if "metrics" in row}
    scores: dict[int, float] = {}
    for client in np.flatnonzero(counts.sum(axis=1)).tolist():
        if personal and client not in personal:
            continue
        by_pattern = personal.get(client, metrics)
        values = [by_pattern.get(pattern, {}).get(metric, math.nan) for pattern in COLUMNS]
        weighted = [(int(n), value) for n, value in zip(counts[client], values, strict=True) if n]
        scores[client] = sum(n * value for n, value in weighted) / sum(n for n, _ in weighted)
    if any(math.isnan(score) for score in scores.values()):
        return []
    if len(rows) == manifest.clients:  # centralised training has a single row, for the pooled data
        for row in rows:
            if row["client"] in scores:
                row["score"] = round(scores[row["client"]], 6)
    return list(scores.values())


def fairness(scores: Sequence[float]) -> dict[str, Any]:
    """{"n", "mean", "sd", "worst_decile"} over clients; the last is the mean of the lowest tenth, rounded up. Empty without
    scores."""
    if not scores:
        return {}
    low = sorted(scores)[: math.ceil(len(scores) / 10)]
    values = {"mean": np.mean(scores), "sd": np.std(scores), "worst_decile": np.mean(low)}
    return {"n": len(scores), **{name: round(float(value), 6) for name, value in values.items()}}
