"""A sweep's folder as a table in the manner of the paper: methods down, heterogeneity across, published figures beside ours."""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fedmllm.errors import RunError
from fedmllm.storage.run_dir import RunDir

_PUBLISHED = Path(__file__).parent / "published.toml"


def setting_of(config: Mapping[str, Any]) -> str:
    """The heterogeneity of an experiment in the paper's notation, such as "β 0.3"; "" for one that the paper does not have."""
    scenario, partition = config["scenario"], config["partition"]
    if scenario["name"] == "aligned" and partition["name"] == "dirichlet":
        return f"α {float(partition.get('alpha', 0.5))}"
    if scenario["name"] == "missing":
        return f"β {float(scenario.get('rate', 0.3))}"
    if scenario["name"] == "hybrid":
        return f"p {float(scenario.get('presence', 0.7))}"
    if scenario["name"] == "cross":
        image, clients = scenario.get("image_clients", 0.5), partition["clients"]
        count = image if isinstance(image, int) else round(image * clients)
        return f"I:T {count}:{clients - count}"
    return ""


def place_of(row: Mapping[str, Any], axis: str) -> tuple[str, ...]:
    """Where a cell lies on all axes but one."""
    return tuple(value for name, value in row["axes"].items() if name != axis)


def published() -> dict[str, Any]:
    """{"source": …, task: {"metric": …, algorithm: {setting: percent}}}"""
    raw = tomllib.loads(_PUBLISHED.read_text(encoding="utf-8"))
    settings = raw.pop("settings")
    for table in raw.values():
        if isinstance(table, dict):
            for algorithm, figures in table.items():
                if isinstance(figures, list):
                    table[algorithm] = dict(zip(settings, figures, strict=True))
    return raw


def read_grid(folder: Path) -> dict[str, Any]:
    """{"name", "axes", "rows": […], "published": […]}: a row a cell of the grid, its metric's mean and s.d. over the seeds that
    are complete. Raises RunError where the folder is no sweep's."""
    try:
        index = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / 'sweep.json'} cannot be read ({error}); run the sweep again.") from None
    cells: dict[tuple[str, ...], dict[str, Any]] = {}
    beside: dict[tuple[str, str], dict[str, Any]] = {}
    known = published()
    first = index["axes"][0] if index["axes"] else None
    for row in index["cells"]:
        cell = cells.setdefault(
            tuple(row["axes"].values()),
            {"axes": row["axes"], "kind": row["kind"], "ids": [], "scores": [], "missing": 0}
            | {"by_pattern": {}, "worst": [], "seconds": [], "bytes": [], "elsewhere": {}},
        )
        if row["id"] in cell["ids"]:  # seeds that share one run are one run
            continue
        run = RunDir(folder / row["id"])
        if not run.complete:
            cell["missing"] += 1
            continue
        result, config = run.result(), tomllib.loads(run.config.read_text(encoding="utf-8"))
        metric, pattern = result["primary_metric"], next(iter(result["metrics"]))
        cell |= {"metric": metric, "pattern": pattern, "algorithm": result["algorithm"], "scenario": config["scenario"]["name"]}
        cell["ids"].append(row["id"])
        cell["scores"].append(result["metrics"][pattern][metric])
        for name, values in result["metrics"].items():
            cell["by_pattern"].setdefault(name, []).append(values.get(metric))
            if "ceiling" in values:
                cell.setdefault("ceiling", {})[name] = values["ceiling"]
        for name, found in result.get("transfer", {}).items():
            scored = cell["elsewhere"].setdefault(name, {"metric": found["primary_metric"], "scores": []})
            scored["scores"].append(found["metrics"][pattern][found["primary_metric"]])
        if row["kind"] in ("federated", "local"):  # the others share a run, whose clients are not this cell's
            cell["worst"].append(result.get("clients", {}).get("worst_decile"))
        cell["seconds"].append(result["seconds"]["total"])
        cell["bytes"].append(sum(result["bytes_up"].values()) + sum(result["bytes_down"].values()))
        task = known.get(config["task"]["name"], {})
        figure = task.get(result["algorithm"], {}).get(setting_of(config)) if row["kind"] == "federated" else None
        if figure is not None and first:
            beside.setdefault(
                (result["algorithm"], row["axes"][first]),
                {"algorithm": result["algorithm"], first: row["axes"][first], "percent": figure, "metric": task["metric"]},
            )
    for cell in cells.values():
        scores = cell["scores"]
        cell["mean"] = statistics.fmean(scores) if scores else None
        cell["sd"] = statistics.stdev(scores) if len(scores) > 1 else None
        cell["patterns"] = {name: spread(values) for name, values in cell.pop("by_pattern").items()}
        elsewhere = cell.pop("elsewhere").items()
        cell["transfer"] = {name: {"metric": one["metric"], **spread(one["scores"])} for name, one in elsewhere}
        cell["worst_decile"] = spread(cell.pop("worst"))
        for key in ("seconds", "bytes"):
            cell[key] = statistics.fmean(cell[key]) if cell[key] else None
    return {
        "name": index["name"],
        "axes": index["axes"],
        "rows": list(cells.values()),
        "published": list(beside.values()),
        "source": known["source"],
    }


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and s.d. over seeds; None where a seed has no value, or is the only one."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known or len(known) < len(values):
        return {"mean": None, "sd": None}
    return {"mean": statistics.fmean(known), "sd": statistics.stdev(known) if len(known) > 1 else None}


def _figure(cell: Mapping[str, Any] | None) -> str:
    if cell is None or cell["mean"] is None:
        return "–"
    spread = f" ± {100 * cell['sd']:.1f}" if cell["sd"] is not None else ""
    return f"{100 * cell['mean']:.1f}{spread}" + ("*" if cell["missing"] else "")


def grid_table(grid: Mapping[str, Any]) -> Table:
    """The first axis across, the others down; what is published below each algorithm's first row."""
    rows: Sequence[Mapping[str, Any]] = grid["rows"]
    across = grid["axes"][0] if grid["axes"] else "run"
    columns = list(dict.fromkeys(row["axes"].get(across, grid["name"]) for row in rows))
    metric = next((row["metric"] for row in rows if "metric" in row), "no run is complete")
    title = f"{grid['name']}: {metric}, %, mean ± s.d. over seeds; * not all seeds are complete"
    table = Table(title=title, title_justify="left", caption=grid["source"] if grid["published"] else None)
    for axis in grid["axes"][1:] or [""]:
        table.add_column(axis)
    for column in columns:
        table.add_column(column, justify="right")
    lines: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        down = tuple(row["axes"][axis] for axis in grid["axes"][1:])
        lines.setdefault(down, {})[row["axes"].get(across, grid["name"])] = row
    figures = {(p["algorithm"], p[across]): p for p in grid["published"]}
    told: set[str] = set()
    for down, found in lines.items():
        table.add_row(*(down or ("",)), *(_figure(found.get(column)) for column in columns))
        algorithm = next(
            (row["algorithm"] for row in found.values() if row["kind"] == "federated" and "algorithm" in row), None
        )
        theirs = [figures.get((algorithm, column)) for column in columns] if algorithm and algorithm not in told else []
        if any(theirs):
            told.add(algorithm or "")
            label = f"  {algorithm}, published ({next(t['metric'] for t in theirs if t)})"
            blank = [""] * (max(len(down), 1) - 1)
            table.add_row(label, *blank, *(f"{t['percent']:.1f}" if t else "–" for t in theirs), style="dim italic")
    return table


def pattern_table(grid: Mapping[str, Any]) -> Table:
    """What was trained in down, what is tested with across: the first axis's cells under each test pattern, and the clients'
    worst tenth."""
    rows: Sequence[Mapping[str, Any]] = grid["rows"]
    patterns = list(dict.fromkeys(name for row in rows for name in row["patterns"]))
    table = Table(title=f"{grid['name']}: trained in × tested with, %, mean ± s.d. over seeds", title_justify="left")
    for axis in (*grid["axes"][1:], *grid["axes"][:1]):
        table.add_column(axis)
    for name in (*patterns, "worst tenth of clients"):
        table.add_column(name, justify="right")
    order = [list(dict.fromkeys(row["axes"][axis] for row in rows)) for axis in grid["axes"]]
    by_method = [*range(1, len(grid["axes"])), *range(min(1, len(grid["axes"])))]
    for row in sorted(rows, key=lambda row: [order[i].index(row["axes"][grid["axes"][i]]) for i in by_method]):
        cells = [row["axes"][axis] for axis in (*grid["axes"][1:], *grid["axes"][:1])]
        figures = [_figure({"missing": row["missing"], **row["patterns"].get(name, spread([]))}) for name in patterns]
        table.add_row(*cells, *figures, _figure({"missing": row["missing"], **row["worst_decile"]}))
    return table


def cells_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What `sweep --dry-run` prints: every cell, its run and how far that is."""
    runs = {row["id"] for row in rows}
    table = Table(title=f"{len(rows)} cells, {len(runs)} distinct runs", title_justify="left")
    for column in (*(rows[0]["axes"] if rows else ()), "seed", "run", "state"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row["axes"].values(), str(row["seed"]), row["id"], row["state"])
    return table
