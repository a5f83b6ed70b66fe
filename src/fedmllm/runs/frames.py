"""The metrics and the rounds of a run as data frames of pandas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from fedmllm.runs.tracking import figures_of_round
from fedmllm.storage.run_dir import RunDir

_WHICH = ("kind", "scenario", "algorithm", "seed")


def metrics_frame(result: Mapping[str, Any], run: str) -> pd.DataFrame:
    """A row per task, pattern and metric; `low` and `high` are NaN for a metric without an interval."""
    which = {"run": run, **{key: result.get(key) for key in _WHICH}}
    tested = {result["task"]: result["metrics"], **{name: t["metrics"] for name, t in result.get("transfer", {}).items()}}
    rows = [{**which, **row} for task, by_pattern in tested.items() for row in _rows(task, by_pattern)]
    return pd.DataFrame(rows, columns=["run", *_WHICH, "task", "pattern", "metric", "value", "low", "high", "n"])


def _rows(task: str, by_pattern: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for pattern, metrics in by_pattern.items():
        for name, value in metrics.items():
            if name == "n" or name.endswith("_ci"):
                continue
            low, high = metrics.get(f"{name}_ci", (float("nan"), float("nan")))
            yield {
                "task": task, "pattern": pattern, "metric": name, "value": value, "low": low, "high": high, "n": metrics["n"],
            }  # fmt: skip


def rounds_frame(run: RunDir) -> pd.DataFrame:
    """A row per round, with the number of rounds that were done after it and the figures that trackers are told."""
    rows = [{"run": run.path.name, "round": record["round"] + 1, **figures_of_round(record)} for record in run.rounds()]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["run", "round"])
