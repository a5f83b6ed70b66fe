"""A sweep's folder as a grid: one row per cell, with its scores over seeds and the published scores for comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedmllm.errors import RunError
from fedmllm.report.published import PublishedScore, published, setting_of
from fedmllm.report.scores import NO_SAMPLES, NO_SPREAD, UNKNOWN, Spread, mean, score
from fedmllm.storage.archive import read_index
from fedmllm.storage.run_dir import RunDir


@dataclass(frozen=True)
class TransferScore:
    """The score on another task's test set, by that task's own metric."""

    metric: str
    spread: Spread

    def to_json(self) -> dict[str, Any]:
        return {"metric": self.metric, **self.spread.to_json()}


@dataclass(frozen=True)
class GridRow:
    """One cell of a grid and its complete runs; `missing` counts the runs that are not complete.

    `units` maps every replicate or seed to its run, which several seeds may share, and `draws` every replicate to its draw of
    the data. `spread` is that of `scores`, the task's metric under the first test pattern; `patterns` has the same metric under
    each pattern and `ceiling` its best possible score, if known. `seconds`, `bytes`, `bytes_by_part` (of the model) and
    `simulated_seconds`, if all runs have a virtual clock, are means per run. `metric`, `pattern`, `algorithm` and `scenario`
    are empty without a complete run. Complete runs whose test set had no sample to show have no scores.
    """

    axes: Mapping[str, str]
    kind: str
    ids: Sequence[str] = ()
    scores: Sequence[float] = ()
    units: Mapping[str, str] = field(default_factory=dict)
    draws: Mapping[str, int] = field(default_factory=dict)
    missing: int = 0
    seconds: float | None = None
    bytes: float | None = None
    bytes_by_part: Mapping[str, float] = field(default_factory=dict)
    simulated_seconds: float | None = None
    metric: str = ""
    pattern: str = ""
    algorithm: str = ""
    scenario: str = ""
    ceiling: Mapping[str, float] = field(default_factory=dict)
    spread: Spread = NO_SPREAD
    accuracy: Spread = NO_SPREAD
    """Under the first test pattern, whatever the task's metric is."""
    patterns: Mapping[str, Spread] = field(default_factory=dict)
    transfer: Mapping[str, TransferScore] = field(default_factory=dict)
    worst_decile: Spread = NO_SPREAD
    epsilon: float | None = None
    """The largest ε that a run spent, if all of them spent a known one."""

    def to_json(self) -> dict[str, Any]:
        names = ["axes", "kind", "ids", "scores", "missing", "seconds", "bytes"]
        names += ["metric", "pattern", "algorithm", "scenario"] if self.ids else []
        names += [name for name in ("ceiling", "epsilon", "simulated_seconds", "bytes_by_part") if getattr(self, name)]
        return {
            **{name: getattr(self, name) for name in names},
            **self.spread.to_json(),
            "patterns": {name: spread.to_json() for name, spread in self.patterns.items()},
            "transfer": {task: transferred.to_json() for task, transferred in self.transfer.items()},
            "worst_decile": self.worst_decile.to_json(),
        }


Cells = dict[tuple[str, ...], dict[str, GridRow]]
"""Rows by their values on some axes, then by their value on another."""


@dataclass(frozen=True)
class Grid:
    """A sweep's cells in the order of its axes, the published scores that belong to them, and the source of those."""

    name: str
    axes: Sequence[str]
    rows: Sequence[GridRow]
    published: Sequence[PublishedScore]
    source: str
    margin: float | None = None
    """The largest difference that does not matter, in points, as the sweep file declared it."""

    def cells(self, downs: Sequence[str], across: str) -> Cells:
        """The rows by their values on the axes `downs`, then by their value on `across` ("" if there is no such axis)."""
        cells: Cells = {}
        for row in self.rows:
            cells.setdefault(tuple(row.axes[axis] for axis in downs), {})[row.axes.get(across, "")] = row
        return cells

    def cells_of(self, axis: str) -> list[str]:
        """The names of the axis's cells."""
        return list(dict.fromkeys(row.axes[axis] for row in self.rows))

    @property
    def mixed_metrics(self) -> bool:
        """Whether the cells have different metrics, so that their scores have no common mean."""
        return len({row.metric for row in self.rows if row.ids}) > 1

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "axes": self.axes,
            "rows": [row.to_json() for row in self.rows],
            "published": [figure.to_json() for figure in self.published],
            "source": self.source,
        }


def row_score(row: GridRow | None) -> str:
    """The printed score of a row, or a dash if the grid has no such cell."""
    if row and row.ids and not row.scores:
        return NO_SAMPLES
    spent = f" (ε = {row.epsilon:.3g})" if row and row.epsilon else ""
    return score(row.spread, row.missing) + spent if row else UNKNOWN


def unit_name(entry: Mapping[str, Any]) -> str:
    """The replicate of a line of the index, or its seed."""
    return f"replicate {entry['replicate']}" if "replicate" in entry else f"seed {entry['seed']}"


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Raises RunError in place of the errors that arise from files of another shape than a run writes."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(f"{where}: a file is not as a run writes it ({reason}); get it again, or repeat the run.") from None


def read_grid(folder: Path) -> Grid:
    """Raises RunError if the folder is not a sweep's or a run in it is not what a run writes."""
    return grid_of(folder, read_index(folder))


def grid_of(folder: Path, index: Mapping[str, Any]) -> Grid:
    """The grid of an index whose `id`s are paths relative to the folder. Raises RunError if a run is not what a run writes."""
    entries: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for entry in index["cells"]:
        entries.setdefault(tuple(entry["axes"].values()), []).append(entry)
    known, first = published(), index["axes"][0] if index["axes"] else ""
    rows, figures = [], dict[tuple[str, str], PublishedScore]()
    for of_cell in entries.values():
        with reading(folder / of_cell[0]["id"]):
            row, configs = _read_row(folder, of_cell)
            rows.append(row)
            for config in configs if row.kind == "federated" and first else ():
                task = known.get(config["task"]["name"], {})
                percent = task.get(row.algorithm, {}).get(setting_of(config))
                if percent is not None:
                    figure = PublishedScore(row.algorithm, first, row.axes[first], percent, task["metric"])
                    figures.setdefault((figure.algorithm, figure.cell), figure)
    return Grid(index["name"], index["axes"], rows, list(figures.values()), known["source"], index.get("margin"))


def _read_row(folder: Path, entries: Sequence[Mapping[str, Any]]) -> tuple[GridRow, list[dict[str, Any]]]:
    """The row of a cell and the configuration of each of its complete runs; `entries` are the cell's lines of the index."""
    results: dict[str, dict[str, Any]] = {}
    units, configs = dict[str, str](), []
    for entry in entries:
        run = RunDir(folder / entry["id"])
        if run.complete:
            units[unit_name(entry)] = entry["id"]
        if run.complete and entry["id"] not in results:  # seeds that share one run count once
            results[entry["id"]] = run.result()
            configs.append(run.settings())
    draws = {unit_name(entry): entry["draw"] for entry in entries if "draw" in entry}
    missing = len({entry["id"] for entry in entries} - results.keys())
    row = GridRow(entries[0]["axes"], entries[0]["kind"], units=units, draws=draws, missing=missing)
    if results:
        scores = _scores_of(list(results.values()), row.kind)
        row = replace(row, ids=list(results), scenario=configs[-1]["scenario"]["name"], **scores)
    return row, configs


def _scores_of(results: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    """The fields of a row that come from the results of its runs."""
    metric, pattern = results[-1]["primary_metric"], next(iter(results[-1]["metrics"]), "")
    metrics: dict[str, list[Mapping[str, Any]]] = {}
    transfer: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        for name, values in result["metrics"].items():
            metrics.setdefault(name, []).append(values)
        for task, values in result.get("transfer", {}).items():
            transfer.setdefault(task, []).append(values)
    scores = [values[metric] for values in metrics.get(pattern, [])]
    spent = [(result.get("privacy_spent") or {}).get("epsilon") for result in results]
    # Cells of the other kinds share runs, so the clients of those runs are not this cell's.
    worst = [result.get("clients", {}).get("worst_decile") for result in results] if kind in ("federated", "local") else []
    return {
        "scores": scores,
        "seconds": mean([result["seconds"]["total"] for result in results]),
        "bytes": mean([sum(result["bytes_up"].values()) + sum(result["bytes_down"].values()) for result in results]),
        "bytes_by_part": _mean_by_part(results),
        "simulated_seconds": mean([result.get("simulated_seconds") for result in results]),
        "metric": metric,
        "pattern": pattern,
        "algorithm": results[-1]["algorithm"],
        "ceiling": {name: v["ceiling"] for name, of_runs in metrics.items() for v in of_runs if "ceiling" in v},
        "spread": Spread.of(scores),
        "accuracy": Spread.of([values.get("accuracy") for values in metrics.get(pattern, [])]),
        "patterns": {name: Spread.of([v.get(metric) for v in of_runs]) for name, of_runs in metrics.items()},
        "transfer": {task: _transfer_score(of_runs, pattern) for task, of_runs in transfer.items()},
        "worst_decile": Spread.of(worst),
        "epsilon": max((float(value) for value in spent if value is not None), default=None) if all(spent) else None,
    }


def _mean_by_part(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A run's mean of bytes up and down by part of the model; empty for runs of versions that did not count them."""
    ways = [way for result in results for way in result.get("bytes_by_part", {}).values()]
    parts = dict.fromkeys(part for way in ways for part in way)
    return {part: sum(way.get(part, 0) for way in ways) / len(results) for part in parts}


def _transfer_score(of_runs: Sequence[Mapping[str, Any]], pattern: str) -> TransferScore:
    metric = of_runs[0]["primary_metric"]
    return TransferScore(metric, Spread.of([values["metrics"].get(pattern, {}).get(metric) for values in of_runs]))
