"""What a sweep file may not say: cells that cannot be told apart, and settings that override each other unnoticed.

Scores are stored and averaged by the names of cells, and a run is known by its settings. If two cells share either, one column
of a table silently stands for two methods, or two columns for one run. Every check raises ConfigError with both places.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from fedmllm.config import Setting, flattened
from fedmllm.errors import ConfigError

Path = tuple[str, ...]
"""A key by its parts."""
Place = tuple[tuple[str, str], ...]
"""(axis, cell) for every axis."""


def check_file(file: str, sweep: Mapping[str, Any], overrides: Sequence[Setting]) -> None:
    """Check the tables of a sweep file, and the overrides of all its cells, before anything is planned."""
    axes = sweep["axes"]
    _check_names(file, "axes", [axis["name"] for axis in axes])
    for number, axis in enumerate(axes):
        _check_names(file, f"axes.{number}.cells", [cell["name"] for cell in axis["cells"]])
        _check_cells(file, axis)
    for seed in sweep["seeds"]:
        if (times := sweep["seeds"].count(seed)) > 1:
            raise ConfigError(f"{file}: seeds: {seed} is given {times} times; give each seed once.")
    _check_seed(file, sweep, overrides)
    keys = [("", _keys(file, "`set`", sweep["set"]))]
    for axis in axes:
        by_path: dict[Path, str] = {}
        for cell in axis["cells"]:
            place = f"the cell {cell['name']!r} of the axis {axis['name']!r}"
            by_path = dict.fromkeys(_keys(file, place, cell["set"]), place) | by_path
        keys.append((axis["name"], by_path))
    _check_keys(file, keys)
    for (name, by_path), (path, _) in ((entry, setting) for entry in keys[1:] for setting in flattened(overrides)):
        if any(key[: len(path)] == tuple(path) for key in by_path):
            raise ConfigError(
                f"--set {'.'.join(path)}: the axis {name!r} of {file} sets it, and its cells would become equal; change "
                "the file instead."
            )


def _check_names(file: str, where: str, names: Sequence[str]) -> None:
    plain = [" ".join(unicodedata.normalize("NFKC", name).split()) for name in names]
    for (i, first), (k, second) in combinations(enumerate(plain), 2):
        if first == second:
            raise ConfigError(f"{file}: {where}.{i} and {where}.{k} are both named {names[k]!r}; give each its own name.")


def _check_cells(file: str, axis: Mapping[str, Any]) -> None:
    for first, second in combinations(axis["cells"], 2):
        if first["kind"] == second["kind"] and _settings(first["set"]) == _settings(second["set"]):
            raise ConfigError(
                f"{file}: the cells {first['name']!r} and {second['name']!r} of the axis {axis['name']!r} have the same "
                "settings; change or remove one of them."
            )


def _check_seed(file: str, sweep: Mapping[str, Any], overrides: Sequence[Setting]) -> None:
    if any(path == ["seed"] for path, _ in overrides):
        raise ConfigError(f"--set seed: {file} names the seeds of all cells in `seeds`; change them there.")
    places = [("`set`", sweep["set"])]
    places += [(f"the cell {c['name']!r} of the axis {a['name']!r}", c["set"]) for a in sweep["axes"] for c in a["cells"]]
    places += [(f"--set {'.'.join(path)}", {".".join(path): value}) for path, value in overrides]
    for place, settings in places:
        if ("seed",) in _settings(settings):
            raise ConfigError(f"{file}: {place} sets seed, which `seeds` sets for every cell; list all seeds in `seeds`.")
        if sweep["replicates"] and ("task", "draw") in _settings(settings):
            raise ConfigError(f"{file}: {place} sets task.draw, which every replicate has of its own; leave it out.")


def _settings(table: Mapping[str, Any]) -> dict[Path, Any]:
    return {tuple(path): value for path, value in flattened([([], table)])}


def _keys(file: str, place: str, table: Mapping[str, Any]) -> dict[Path, str]:
    """Every key that a table of settings sets, mapped to `place`."""
    paths = [tuple(path) for path, _ in flattened([([], table)])]
    for first, second in combinations(paths, 2):
        if key := _common(first, second):
            raise ConfigError(f"{file}: {place} sets {key} twice, as {'.'.join(first)} and as {'.'.join(second)}; set it once.")
    return dict.fromkeys(paths, place)


def _common(first: Path, second: Path) -> str:
    """The key that both paths set, which is the longer one if the other is a table around it; else empty."""
    shorter, longer = sorted((first, second), key=len)
    return ".".join(longer) if longer[: len(shorter)] == shorter else ""


def _check_keys(file: str, keys: Sequence[tuple[str, Mapping[Path, str]]]) -> None:
    for (_, first), (_, second) in combinations(keys, 2):
        for path, place in first.items():
            for other, other_place in second.items():
                if key := _common(path, other):
                    raise ConfigError(f"{file}: {key} is set by {place} and by {other_place}; set each key in one place.")


def check_runs(file: str, sweep: Mapping[str, Any], runs: Sequence[tuple[Mapping[str, str], str, str]]) -> None:
    """Check the planned runs, each given as (place on the axes, kind, id).

    Cells may share a run if it does not depend on their axis, such as zero-shot under two algorithms. Two cells that are
    federated, or whose own axis says their kind, may not.
    """
    ids: dict[Place, list[str]] = {}
    for axes, _, run_id in runs:
        ids.setdefault(tuple(axes.items()), []).append(run_id)
    federated = {tuple(axes.items()) for axes, kind, _ in runs if kind == "federated"}
    for axis, place, other in _neighbours(sweep, list(ids)):
        kinds = {cell["name"]: cell["kind"] for cell in axis["cells"]}
        first, second = dict(place)[axis["name"]], dict(other)[axis["name"]]
        own_kind = kinds[first] is not None and kinds[first] == kinds[second]
        if ids[place] == ids[other] and (own_kind or {place, other} <= federated):
            raise ConfigError(
                f"{file}: the cells {first!r} and {second!r} of the axis {axis['name']!r} are the same run {ids[place][0]}: "
                "their settings have the same values, or do not matter to this kind of run; change or remove one of them."
            )


def _neighbours(sweep: Mapping[str, Any], places: Sequence[Place]) -> Iterator[tuple[Mapping[str, Any], Place, Place]]:
    """(an axis, two places that differ on that axis only)."""
    for number, axis in enumerate(sweep["axes"]):
        lines: dict[Place, list[Place]] = {}
        for place in places:
            lines.setdefault(place[:number] + place[number + 1 :], []).append(place)
        for line in lines.values():
            for first, second in combinations(line, 2):
                yield axis, first, second
