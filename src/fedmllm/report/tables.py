"""Finished runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def percent(metrics: Mapping[str, Any], name: str) -> str:
    """ "71.3 [67.8, 74.9]", with " of 90" where it is of fewer samples than were asked, or a dash where it is absent."""
    if name not in metrics:
        return "–"
    low, high = metrics[f"{name}_ci"]
    of = f" of {metrics[f'{name}_n']}" if f"{name}_n" in metrics else ""
    return f"{100 * metrics[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]{of}"


def megabytes(groups: Mapping[str, int]) -> str:
    return f"{sum(groups.values()) / 1e6:.1f}"


def comparison(results: Sequence[Mapping[str, Any]]) -> Table:
    """One row a run: the primary metric under each pattern with its 95 % interval, and what it cost."""
    patterns = list(dict.fromkeys(p for r in results for p in r["metrics"]))
    metric = " / ".join(dict.fromkeys(r["primary_metric"] for r in results))
    table = Table(title=f"{metric}, % [95 % interval]", title_justify="left")
    table.add_column("run")
    for pattern in patterns:
        table.add_column(pattern, justify="right")
    for heading in ("rounds", "MB up", "MB down", "seconds"):
        table.add_column(heading, justify="right")
    for result in results:
        kind = result["kind"] if result["kind"] != "federated" else _method(result)
        cells = [percent(result["metrics"].get(p, {}), result["primary_metric"]) for p in patterns]
        cost = [str(result["rounds"]), megabytes(result["bytes_up"]), megabytes(result["bytes_down"])]
        table.add_row(f"{result['name']} · {kind}", *cells, *cost, f"{result['seconds']['total']:.0f}")
    return table


def _method(result: Mapping[str, Any]) -> str:
    wrappers = [result.get(key, "none") for key in ("regularization", "compression", "secure")]
    return " + ".join([result["algorithm"], *(name for name in wrappers if name != "none")])


def metrics_table(metrics: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """One row a pattern, one column a metric."""
    names = list(dict.fromkeys(k for m in metrics.values() for k in m if f"{k}_ci" in m))
    table = Table(title=title, title_justify="left")
    table.add_column("pattern")
    for name in names:
        table.add_column(f"{name}, %", justify="right")
    lows = list(dict.fromkeys(k for m in metrics.values() for k in m if k.endswith("_worst_decile")))
    for name in lows:
        table.add_column(f"{name.removesuffix('_worst_decile')} of the worst tenth of clients, %", justify="right")
    known = any("ceiling" in values for values in metrics.values())
    for name in (*(["best possible, %"] if known else []), "n", "parse_failures"):
        table.add_column(name, justify="right")
    for pattern, values in metrics.items():
        low = (f"{100 * values[name]:.1f}" for name in lows)
        best = [f"{100 * values['ceiling']:.1f}" if "ceiling" in values else "–"] if known else []
        counts = (str(values["n"]), str(values["parse_failures"]))
        table.add_row(pattern, *(percent(values, n) for n in names), *low, *best, *counts)
    return table
