"""The results of `gpu.py`: a file that always holds what is measured so far, and tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contenders.workload import BATCH
from gpu_kit.measuring import Measured
from harness import median_and_range

SAME_LOSS = 0.02
"""The relative difference that rounding to bfloat16 may cause between ways that do the same work."""
SLACK = 0.95
"""A cohort is large enough if it reaches this share of the highest rate."""


class Report:
    """`content` is kept in `gpu.json` of the folder, if there is one."""

    def __init__(self, folder: Path | None, facts: Mapping[str, Any]) -> None:
        self._folder = folder
        self.content: dict[str, Any] = {**facts, "shapes": {}, "finished": False}
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        if self._folder:
            temporary = self._folder / "gpu.json.tmp"
            temporary.write_text(json.dumps(self.content, indent=2, default=vars) + "\n")
            temporary.replace(self._folder / "gpu.json")

    def save_profile(self, name: str, table: str) -> None:
        if self._folder:
            (self._folder / f"profile-{name}.txt").write_text(table)

    def failures(self) -> list[str]:
        """What makes the exit status 1: failed ways, and ways that reach different losses."""
        lines = []
        for shape, record in self.content["shapes"].items():
            if failed := record.get("failed"):
                lines.append(f"{shape} {failed}")
            for part, results in record.get("parts", {}).items():
                lines += [
                    f"{shape}, {part}, {name}: {r.why}" for name, r in results.items() if r.why and r.why.startswith("failed")
                ]
                if not same_losses(results):
                    lines.append(f"{shape}, {part}: the ways reach different losses, so the ratios compare different work")
        return lines


def same_losses(results: Mapping[str, Measured]) -> bool:
    losses = [result.loss for result in results.values() if result.loss is not None]
    return all(abs(loss - losses[0]) <= SAME_LOSS * abs(losses[0]) for loss in losses)  # which NaN is not


def enough_tokens(cohorts: Mapping[int, Measured], length: int) -> tuple[int, bool] | None:
    """(tokens in a pass of the smallest cohort that is as fast as any, whether this is the largest that was measured)."""
    rates = {clients: statistics.median(result.rates) for clients, result in cohorts.items() if result.rates}
    if not rates:
        return None
    best = min(clients for clients, rate in rates.items() if rate >= SLACK * max(rates.values()))
    return best * BATCH * length, best == max(rates)


def print_rows(results: Mapping[str, Measured], base: str, operations: float = 0.0, peak: float = math.inf) -> None:
    """One line per way, or why it was not measured. `operations`: per token; `peak`: operations per second."""
    if not results:
        return
    unit = "tokens / s" if operations else "questions / s"
    print(f"\n{'':60}{unit:>14}{'of peak':>9}{'memory':>10}   ratio to {base}")
    for name, result in results.items():
        if not result.rates:
            print(f"{name:62}{result.why}", flush=True)
            continue
        rate = statistics.median(result.rates)
        share = f"{100 * rate * operations / peak:.1f} %" if operations else "–"
        memory = f"{result.memory / 1e9:.1f} GB" if result.memory is not None else "–"
        others = results[base].rates if base in results else []
        ratios = [own / other for own, other in zip(result.rates, others, strict=False)] or [math.nan]
        print(f"{name:60}{rate:14,.1f}{share:>9}{memory:>10}{median_and_range(ratios)}  {result.why or ''}", flush=True)
