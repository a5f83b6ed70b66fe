"""Grids of experiments: a base file, axes of named cells, seeds; each distinct run once, in a process of its own, on this
machine or where a `Launcher` puts it.

A run's id is the digest of what its kind depends on, so a cell that is complete is skipped, one that was cut short goes on,
and cells that mean the same run (zero-shot under any algorithm) share it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field, ValidationError

from fedmllm import config as files
from fedmllm.config import Experiment, Named, PartitionTable, Table, TrainTable
from fedmllm.errors import ConfigError, RunError
from fedmllm.experiment.parts import build, options_of
from fedmllm.experiment.processes import Processes
from fedmllm.registry import explain
from fedmllm.storage.archive import INDEX
from fedmllm.storage.atomic import write_atomically
from fedmllm.storage.lock import alone
from fedmllm.storage.run_dir import RunDir, RunKind


class Cell(Table):
    """One value of an axis: settings in the notation of `--set`, and the kind of run where it is no federated one."""

    name: str
    kind: RunKind | None = None
    set: dict[str, Any] = Field(default_factory=dict)


class Axis(Table):
    name: str
    cells: Annotated[tuple[Cell, ...], Field(strict=False, min_length=1)]


class Sweep(Table):
    """A sweep file. `base` is an experiment file, relative to it; `set` applies to every cell."""

    name: str
    base: str
    seeds: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = (0,)
    set: dict[str, Any] = Field(default_factory=dict)
    axes: Annotated[tuple[Axis, ...], Field(strict=False)] = ()


@dataclass(frozen=True)
class PlannedRun:
    """A cell of the grid: where it lies on each axis, and the run that it needs."""

    axes: Mapping[str, str]
    seed: int
    kind: RunKind
    experiment: Experiment

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.experiment.digest()[:12]}"

    def __str__(self) -> str:
        return " · ".join((*self.axes.values(), f"seed {self.seed}"))


def essential(experiment: Experiment, kind: RunKind) -> Experiment:
    """The experiment with every setting that this kind of run does not depend on at its default."""
    plain: dict[str, Any] = dict.fromkeys(("regularization", "compression", "secure"), Named(name="none"))
    if not experiment.clients.rank:  # an algorithm for unequal ranks must stay beside them
        plain["algorithm"] = Named(name="fedavg")
    if kind == "zero-shot":
        plain |= {
            "seed": 0,
            "partition": PartitionTable(name="iid"),
            "train": TrainTable(max_length=experiment.train.max_length),
        }
    if kind == "centralised":
        plain["partition"] = PartitionTable(name="iid", clients=experiment.partition.clients)
    if kind in ("zero-shot", "centralised"):
        plain |= {"scenario": Named(name="aligned"), "clients": files.ClientsTable(), "algorithm": Named(name="fedavg")}
    return experiment.model_copy(update=plain) if kind != "federated" else experiment


def read(path: Path) -> Sweep:
    """Raises ConfigError for the first thing that is wrong with the file."""
    try:
        return Sweep.model_validate(files.read(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, '', lambda where: _keys(where))}") from None


def _keys(where: tuple[int | str, ...]) -> Mapping[str, Any]:
    depth = len([part for part in where if isinstance(part, str)])
    tables: tuple[type[Table], ...] = (Sweep, Axis, Cell)
    return tables[min(depth, 2)].model_fields


def plan_sweep(path: Path, overrides: Sequence[str] = ()) -> tuple[Sweep, list[PlannedRun]]:
    """All cells of the grid. Raises ConfigError, naming the cell, where one is no good; data and model are not touched."""
    sweep = read(path)
    raw = files.read(path.parent / sweep.base)
    extra = [files.parse_override(override) for override in overrides]
    planned = []
    for cells in product(*(axis.cells for axis in sweep.axes)):
        axes = {axis.name: cell.name for axis, cell in zip(sweep.axes, cells, strict=True)}
        kinds: set[RunKind] = {cell.kind for cell in cells if cell.kind} or {"federated"}
        where = f"{path}: the cell {' · '.join(axes.values()) or sweep.name}"
        if len(kinds) > 1:
            raise ConfigError(f"{where}: is of kinds {sorted(kinds)} at once; let one axis say the kind.")
        kind = kinds.pop()
        settings = [*sweep.set.items(), *(item for cell in cells for item in cell.set.items())]
        paths = [(key.split("."), value) for key, value in settings]
        for seed in sweep.seeds:
            chosen, _ = files.apply_settings(raw, [*paths, (["seed"], seed), *extra], options_of)
            try:
                experiment = build(essential(files.validate(chosen), kind)).config
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
            planned.append(PlannedRun(axes, seed, kind, experiment))
    return sweep, planned


class Launcher(Protocol):
    """Where runs become processes. `command` is what follows `fedmllm`; `file` is the experiment file that it names."""

    def run(self, command: Sequence[str], file: Path) -> tuple[int, str]:
        """(exit status, the last line that it said). Called from several threads."""

    def stop(self) -> None:
        """End what runs, and start nothing more."""


class Sweeper:
    """Runs what is missing of a grid. `report(done, total, text)` is told of every run that ends."""

    def __init__(self, sweep: Sweep, planned: Sequence[PlannedRun], out: Path, report: Callable[[int, int, str], None]) -> None:
        self._sweep, self._planned, self._out, self._report = sweep, planned, out, report
        self._errors: dict[str, str] = {}

    def state(self, one: PlannedRun) -> str:
        """ "complete", "failed", "cut short" or "new"."""
        run = RunDir(self._out / one.id)
        if run.complete:
            return "complete"
        return "failed" if one.id in self._errors else "cut short" if run.exists else "new"

    def rows(self) -> list[dict[str, Any]]:
        """The index: a row a cell."""
        return [
            {"axes": dict(p.axes), "seed": p.seed, "kind": p.kind, "id": p.id, "state": self.state(p)}
            | ({"error": self._errors[p.id]} if p.id in self._errors else {})
            for p in self._planned
        ]

    def run(self, jobs: int, launcher: Launcher | None = None) -> list[dict[str, Any]]:
        """Do all that is not complete, `jobs` at a time, going on past failures; the index. Raises KeyboardInterrupt."""
        launcher = launcher or Processes(jobs)
        refusal = RunError(f"{self._out}: another sweep is running there; wait for it, or give another --out.")
        with alone(self._out / ".lock", refusal):
            todo = list({p.id: p for p in self._planned if self.state(p) != "complete"}.values())
            self._write_index()
            with ThreadPoolExecutor(max_workers=jobs) as pool:
                futures = {pool.submit(self._one, p, launcher): p for p in todo}
                try:
                    for done, future in enumerate(as_completed(futures), start=1):
                        future.result()
                        one = futures[future]
                        self._report(done, len(todo), f"{one}: {self._errors.get(one.id, 'done')}")
                        self._write_index()
                except BaseException:
                    launcher.stop()
                    raise
            return self.rows()

    def _write_index(self) -> None:
        content = {"schema": 1, "name": self._sweep.name, "axes": [a.name for a in self._sweep.axes], "cells": self.rows()}
        write_atomically(self._out / INDEX, (json.dumps(content, indent=2) + "\n").encode())

    def _one(self, one: PlannedRun, launcher: Launcher) -> None:
        file = self._out / f"{one.id}.toml"
        write_atomically(file, one.experiment.toml().encode())
        what = ["run"] if one.kind == "federated" else ["baseline", one.kind]
        status, said = launcher.run([*what, str(file), "--out", str(self._out / one.id), "--resume", "--json"], file)
        if status:
            self._errors[one.id] = f"exit status {status}: {said}"
