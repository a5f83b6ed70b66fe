"""The replicates of a grid's cells: one score per run, matched between methods, ready for `protocol`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmllm.errors import RunError
from fedmllm.evaluation.answers import DRAWS, bootstrap_scores, test_digest
from fedmllm.report.grids import GridRow, reading
from fedmllm.report.protocol import Resamples, Units, regrouped
from fedmllm.storage.run_dir import RunDir


@dataclass(frozen=True)
class Unit:
    """One run as a replicate. `tested` identifies its test samples; `resampled` (draws,) has its score on resamples of them,
    which are the same for all runs with these test samples."""

    metric: str
    score: float
    tested: str
    resampled: NDArray[np.float64]


Rows = Mapping[str, GridRow]
"""place -> one method's row there."""


@dataclass(frozen=True)
class Matched:
    """The scores of several methods on the same units, and their resamples if units share a test set. `places` are the places
    that all methods have. If they have the same draws of the data, as settings of an attack have, a unit is one replicate at
    all of them, which `averaged` says; `shared` says that so have the seeds of runs of earlier versions."""

    scores: Mapping[str, Units]
    resamples: Mapping[str, Resamples] | None
    places: tuple[str, ...]
    averaged: bool
    shared: bool


class UnitReader:
    """Reads the runs of a sweep, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._units: dict[tuple[str, str], Unit] = {}

    def _unit(self, run_id: str, pattern: str) -> Unit:
        if (run_id, pattern) not in self._units:
            self._units[run_id, pattern] = read_unit(RunDir(self._folder / run_id), pattern)
        return self._units[run_id, pattern]

    def scores(self, *rows: GridRow) -> list[dict[str, dict[str, float]]]:
        """The scores of each row by unit, under one place."""
        return [{"": {unit: self._unit(run, row.pattern).score for unit, run in row.units.items()}} for row in rows]

    def match(self, methods: Mapping[str, Rows]) -> Matched:
        """The units of the methods at the places that all of them have; means over the places if these have the same draws.

        Raises what `by_place` raises.
        """
        matched = self.by_place(methods)
        if not matched.averaged:
            return matched
        scores = {name: regrouped(of_method, matched.places) for name, of_method in matched.scores.items()}
        resamples = {name: regrouped(of_method, matched.places) for name, of_method in (matched.resamples or {}).items()}
        return replace(matched, scores=scores, resamples=resamples or None)

    def by_place(self, methods: Mapping[str, Rows]) -> Matched:
        """The units of the methods at each of the places that all of them have.

        Raises RunError if the methods were not tested on the same samples of the same draws, or if only some of a place's
        replicates share their test samples.
        """
        places = tuple(p for p in next(iter(methods.values())) if all(p in rows and rows[p].ids for rows in methods.values()))
        units: dict[str, dict[str, dict[str, Unit]]] = {
            name: {p: {unit: self._unit(run, rows[p].pattern) for unit, run in rows[p].units.items()} for p in places}
            for name, rows in methods.items()
        }
        for place in places:
            _check_same(place, {name: rows[place].draws for name, rows in methods.items()}, "draws of the data")
            tests = {n: {u: (x.metric, x.tested) for u, x in by_place[place].items()} for n, by_place in units.items()}
            _check_same(place, tests, "test samples")
        shared = not any(rows[place].draws for rows in methods.values() for place in places)
        draws = [rows[place].draws for place in places for rows in methods.values()]
        averaged = shared or (len(places) > 1 and all(drawn == draws[0] for drawn in draws))
        for name, rows in methods.items():
            runs = [run for place in places[: 1 if averaged else None] for run in rows[place].units.values()]
            if not shared and len(set(runs)) < len(runs):
                raise RunError(
                    f"one run of {name} serves several replicates, which are then not independent; sweep them again."
                )
        scores = {n: {p: {u: x.score for u, x in at.items()} for p, at in by_place.items()} for n, by_place in units.items()}
        resamples = {n: {p: {u: x.resampled for u, x in at.items()} for p, at in by.items()} for n, by in units.items()}
        tested = [{p: by_place[p] for p in places[: 1 if averaged else None]} for by_place in units.values()]
        fixed = shared or _one_test_set(tested)
        return Matched(scores, resamples if fixed else None, places, averaged, shared)


def _check_same(place: str, by_method: Mapping[str, Mapping[str, Any]], what: str) -> None:
    """Raises RunError if two methods differ in a unit that both have."""
    known: dict[str, Any] = {}
    for name, values in by_method.items():
        if differing := [unit for unit, value in values.items() if known.setdefault(unit, value) != value]:
            raise RunError(
                f"{name} and {next(iter(by_method))} have different {what} in {differing[0]}{f' at {place}' if place else ''}; "
                "compare along an axis that leaves task, partition and scenario as they are."
            )


def _one_test_set(methods: Iterable[Mapping[str, Mapping[str, Unit]]]) -> bool:
    """Whether the replicates of each place share their test samples (a published test set), rather than each having others."""
    tested: dict[str, dict[str, str]] = {}
    for by_place in methods:
        for place, at in by_place.items():
            tested.setdefault(place, {}).update({name: unit.tested for name, unit in at.items()})
    kinds = {len(set(at.values())) == 1 for at in tested.values() if len(at) > 1}
    fresh = [samples for at in tested.values() for samples in at.values()]
    if len(kinds) > 1 or (kinds == {False} and len(set(fresh)) < len(fresh)):
        raise RunError(
            "some replicates share their test samples and others do not; sweep them again with one setting of draws."
        )
    return kinds == {True}


def read_unit(run: RunDir, pattern: str) -> Unit:
    """Raises RunError if the run has neither resampled scores nor predictions under the pattern."""
    with reading(run.path):
        return _read_unit(run, run.result(), pattern)


def _read_unit(run: RunDir, result: Mapping[str, Any], pattern: str) -> Unit:
    metric, score = result["primary_metric"], result["metrics"].get(pattern, {}).get(result["primary_metric"])
    score = float("nan") if score is None else float(score)
    if "bootstrap_scores" in result:
        resampled = np.array(result["bootstrap_scores"].get(pattern, [math.nan] * DRAWS), dtype=np.float64)
        if len(resampled) != DRAWS:
            raise RunError(
                f"{run.path}: result.json has {len(resampled)} resampled scores under the pattern {pattern!r} instead of "
                f"{DRAWS}; run the experiment again."
            )
        return Unit(metric, score, tested_on(run, result["test_digest"]), resampled)
    lines = [line for line in run.predictions() if line["pattern"] == pattern]
    if not lines:
        raise RunError(f"{run.path}: predictions.jsonl has none under the pattern {pattern!r}; run the experiment again.")
    if metric == "auc" and not result.get("positive"):
        raise RunError(f"{run.path}: result.json does not name the positive answer; run the experiment again.")
    models: dict[Any, list[dict[str, Any]]] = {}
    for line in lines:
        models.setdefault(line.get("client"), []).append(line)
    first = next(iter(models.values()))
    resampled = np.array(bootstrap_scores(metric, result.get("positive"), list(models.values())), dtype=np.float64)
    return Unit(metric, score, tested_on(run, test_digest(first)), resampled)


def tested_on(run: RunDir, digest: str) -> str:
    """What identifies a run's test samples: the `digest` of their ids and answers, and the seed of a generated task, whose
    samples have the same ids, and often the same answers, whatever its seed. Raises RunError if the settings are damaged."""
    task = run.settings()["task"] if run.config.exists() else {}
    return f"{digest}, seed {task.get('draw', task['seed'])}" if "seed" in task else digest
