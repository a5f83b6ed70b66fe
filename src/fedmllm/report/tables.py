"""Tables of finished runs in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fedmllm.report.scores import NO_SAMPLES, UNKNOWN

_BESIDE = {"majority": "majority %", "chance": "chance %", "ceiling": "ceiling %"}
"""What stands beside the scores -> its heading."""


def percent(metrics: Mapping[str, Any], name: str) -> str:
    """ "71.3 [67.8, 74.9]", with " of 90" if the metric covers fewer samples than `n`, or a dash if it is absent."""
    if name not in metrics:
        return UNKNOWN
    low, high = metrics[f"{name}_ci"]
    of = f" of {metrics[f'{name}_n']}" if f"{name}_n" in metrics else ""
    return f"{100 * metrics[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]{of}"


def _megabytes(groups: Mapping[str, int]) -> str:
    return f"{sum(groups.values()) / 1e6:.1f}"


def _simulated(result: Mapping[str, Any]) -> float | None:
    """Seconds on the virtual clock; None without one, as in runs of versions that had none."""
    return result.get("simulated_seconds")


def comparison(results: Sequence[Mapping[str, Any]], folders: Sequence[Path] = ()) -> Table:
    """One row per run: the task's metric under each pattern with its 95 % interval, and the cost of the run. With their
    `folders`, runs are named by these, seed and method, otherwise by the experiment and the method."""
    patterns = list(dict.fromkeys(pattern for result in results for pattern in result["metrics"]))
    metric = " / ".join(dict.fromkeys(result["primary_metric"] for result in results))
    table = Table(title=f"{metric}, % [95 % interval]", title_justify="left")
    table.add_column("run")
    for heading in ("seed", "method") if folders else ():
        table.add_column(heading, justify="right")
    for pattern in patterns:
        table.add_column(pattern, justify="right")
    timed = any(_simulated(result) is not None for result in results)
    for heading in ("rounds", *(["simulated s"] if timed else []), "MB up", "MB down", "seconds"):
        table.add_column(heading, justify="right")
    names = short_names(folders)
    for number, result in enumerate(results):
        kind = result["kind"] if result["kind"] != "federated" else method(result)
        named = [names[number], str(result["seed"]), kind] if folders else [f"{result['name']} · {kind}"]
        scores = [
            percent(result["metrics"][pattern], result["primary_metric"]) if pattern in result["metrics"] else NO_SAMPLES
            for pattern in patterns
        ]
        seconds = _simulated(result)
        clock = [] if not timed else [UNKNOWN if seconds is None else f"{seconds:.0f}"]
        cost = [_rounds(result), *clock, _megabytes(result["bytes_up"]), _megabytes(result["bytes_down"])]
        table.add_row(*named, *scores, *cost, f"{result['seconds']['total']:.0f}")
    return table


def short_names(folders: Sequence[Path]) -> list[str]:
    """The names of the folders, or their paths if some have the same name."""
    names = [folder.absolute().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


_WRAPPERS = ("regularization", "compression", "secure", "robust", "privacy", "attack", "asynchronous")


def method(result: Mapping[str, Any]) -> str:
    """The algorithm and what it was combined with, and the ε that was spent."""
    wrappers = [result.get(key, "none") for key in _WRAPPERS]
    epsilon = (result.get("privacy_spent") or {}).get("epsilon")
    spent = [] if epsilon is None else [f"ε = {epsilon:.3g}"]
    return " + ".join([result["algorithm"], *(name for name in wrappers if name != "none"), *spent])


def _rounds(result: Mapping[str, Any]) -> str:
    """The rounds of a run, and which of them, counted from 1, made the model that was kept if it is not that of the last."""
    kept, why = result.get("kept_rounds", []), []
    if result.get("stopped_early"):
        why.append("stopped early")
    if result.get("keep") == "best" and kept:
        why.append(f"kept {kept[0] + 1}")
    if result.get("keep") == "mean" and kept:
        why.append(f"mean of {len(kept)}")
    return str(result["rounds"]) + (f" ({', '.join(why)})" if why else "")


def metrics_table(metrics: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """One row per pattern, one column per metric."""
    names = list(dict.fromkeys(key for values in metrics.values() for key in values if f"{key}_ci" in values))
    table = Table(title=title, title_justify="left")
    table.add_column("pattern")
    for name in names:
        table.add_column(f"{name}, %", justify="right", no_wrap=True)
    deciles = list(dict.fromkeys(key for values in metrics.values() for key in values if key.endswith("_worst_decile")))
    for name in deciles:
        table.add_column(f"{name.removesuffix('_worst_decile')} of the worst tenth of clients, %", justify="right")
    beside = [key for key in _BESIDE if any(key in values for values in metrics.values())]
    for name in (*(_BESIDE[key] for key in beside), "n", "parse failures"):
        table.add_column(name, justify="right")
    for pattern, values in metrics.items():
        worst = (f"{100 * values[name]:.1f}" for name in deciles)
        known = (f"{100 * values[key]:.1f}" if key in values else UNKNOWN for key in beside)
        counts = (str(values["n"]), str(values["parse_failures"]))
        table.add_row(pattern, *(percent(values, name) for name in names), *worst, *known, *counts)
    return table
