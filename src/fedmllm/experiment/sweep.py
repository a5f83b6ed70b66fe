"""Grids of experiments: a base file, axes of named cells, and replicates; every distinct run is executed once, as a process.

A place is a setting of the data: task, partition and scenario. Each replicate of a place has a seed and a draw of training and
test samples that belong to this place alone and are shared by all methods there, so that replicates are independent. A run's
id is the digest of the settings that its kind depends on. So complete runs are skipped, interrupted ones are resumed, and cells
that mean the same run (zero-shot under any algorithm) share it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, Field, ValidationError

from fedmllm import config as files
from fedmllm.config import (
    ClientsTable,
    Experiment,
    FolderName,
    Named,
    PartitionTable,
    Positive,
    ScenarioTable,
    Seed,
    Setting,
    Table,
    TrainTable,
)
from fedmllm.config.base import at_most
from fedmllm.errors import ConfigError, RunError, suggest
from fedmllm.experiment.parts import build, options_of, with_defaults
from fedmllm.experiment.processes import Processes
from fedmllm.experiment.sweep_checks import check_file, check_runs
from fedmllm.kinds import RunKind
from fedmllm.progress import ProgressCallback
from fedmllm.registry import explain
from fedmllm.rng import seed_for
from fedmllm.storage.archive import INDEX
from fedmllm.storage.atomic import remove_leftovers, write_atomically
from fedmllm.storage.lock import locked
from fedmllm.storage.run_dir import RunDir


def _printable(name: str) -> str:
    if not name.strip() or not name.isprintable() or len(name) > 100:
        raise ValueError("must have 1 to 100 printable characters, because it heads a row or a column")
    return name


Label = Annotated[str, AfterValidator(_printable)]


class Cell(Table):
    """One value of an axis: settings in the notation of `--set`, and the kind of run if it is not federated."""

    name: Label
    kind: RunKind | None = None
    set: dict[str, Any] = Field(default_factory=dict)


class Axis(Table):
    name: Label
    cells: Annotated[tuple[Cell, ...], Field(strict=False, min_length=1)]


class Sweep(Table):
    """A sweep file. `base` is an experiment file, relative to it; `set` applies to every cell.

    Every cell is run with each of the `seeds` on the same data, or instead with `replicates` draws of seed and data. `margin`
    declares beforehand, in points, the largest difference that does not matter.
    """

    name: FolderName
    base: str
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = (0,)
    replicates: Annotated[Positive, at_most(10_000, "because each is a run of every cell")] | None = None
    margin: Annotated[float, Field(gt=0)] | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    axes: Annotated[tuple[Axis, ...], Field(strict=False)] = ()


@dataclass(frozen=True)
class PlannedRun:
    """A cell of the grid with one seed: its value on each axis, and the run that it needs. `replicate` counts from 0, and is
    None if the sweep has seeds; the draw is `experiment.task.draw`."""

    axes: Mapping[str, str]
    seed: int
    kind: RunKind
    experiment: Experiment
    replicate: int | None = None

    @cached_property
    def id(self) -> str:
        return f"{self.kind}-{self.experiment.digest()[:12]}"

    def __str__(self) -> str:
        which = f"seed {self.seed}" if self.replicate is None else f"replicate {self.replicate}"
        return " · ".join((*self.axes.values(), which))

    def to_json(self) -> dict[str, Any]:
        """The row of the index, without the state of the run."""
        drawn = {} if self.replicate is None else {"replicate": self.replicate, "draw": self.experiment.task.draw}
        return {"axes": dict(self.axes), "seed": self.seed, **drawn, "kind": self.kind, "id": self.id}


def essential(experiment: Experiment, kind: RunKind) -> Experiment:
    """The experiment with the default for every setting that this kind of run does not depend on."""
    if kind == "federated":
        return experiment
    defaults: dict[str, Any] = dict.fromkeys(
        ("regularization", "compression", "secure", "robust", "privacy", "attack", "asynchronous"), Named(name="none")
    )
    defaults["clients"] = ClientsTable(**{key: getattr(experiment.clients, key) for key in ("rank", "epochs", "batch_size")})
    # Baselines sample no clients, and clients alone are tested at the end only.
    unused = ["selection", "candidates", "over_select", "deadline", "late"]
    unused += ["keep", "mean_of", "patience"] if kind == "local" else []
    defaults["train"] = experiment.train.model_copy(update={key: TrainTable.model_fields[key].default for key in unused})
    if not experiment.clients.rank:  # clients of unequal rank need an algorithm that supports them
        defaults["algorithm"] = Named(name="fedavg")
    if kind == "zero-shot":
        defaults |= {
            "seed": 0,
            "partition": PartitionTable(name="iid"),
            "train": TrainTable(max_length=experiment.train.max_length),
        }
    if kind == "centralised":
        defaults["partition"] = PartitionTable(name="iid", clients=experiment.partition.clients)
    if kind in ("zero-shot", "centralised"):
        defaults |= {"scenario": ScenarioTable(name="aligned"), "clients": ClientsTable(), "algorithm": Named(name="fedavg")}
    return experiment.model_copy(update=defaults)


def read(path: Path) -> Sweep:
    """Raises ConfigError for the first thing that is wrong with the file."""
    try:
        sweep = Sweep.model_validate(files.read(path, "sweep"))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, '', _known_keys)}") from None
    if sweep.replicates is not None and "seeds" in sweep.model_fields_set:
        raise ConfigError(f"{path}: replicates have seeds of their own; give either seeds or replicates.")
    return sweep


def _known_keys(path: tuple[int | str, ...]) -> Mapping[str, Any]:
    depth = len([part for part in path if isinstance(part, str)])
    tables: tuple[type[Table], ...] = (Sweep, Axis, Cell)
    return tables[min(depth, 2)].model_fields


def _settings(sweep: Sweep, cells: Sequence[Cell]) -> list[Setting]:
    """What the sweep and one cell of each axis set."""
    return files.flattened([([], table) for table in (sweep.set, *(cell.set for cell in cells))])


def place_draw(experiment: Experiment, replicate: int) -> int:
    """The seed and the draw of a replicate of the experiment's place: its task, partition and scenario, and its split.

    `eval.split` belongs to the place so that a search on held-out training data uses other draws than the grid.
    """
    settings = experiment.resolved()
    place = {table: settings[table] for table in ("task", "partition", "scenario")} | {"split": experiment.eval.split}
    return seed_for(0, json.dumps(place, sort_keys=True), replicate)


def plan_sweep(path: Path, overrides: Sequence[str] = ()) -> tuple[Sweep, list[PlannedRun]]:
    """All cells of the grid, without reading data or a model. Raises ConfigError naming the first invalid cell."""
    sweep = read(path)
    raw = files.read(path.parent / sweep.base)
    overriding = [files.parse_override(override) for override in overrides]
    check_file(str(path), sweep.model_dump(), overriding)
    planned = []
    for cells in product(*(axis.cells for axis in sweep.axes)):
        axes = {axis.name: cell.name for axis, cell in zip(sweep.axes, cells, strict=True)}
        kinds: set[RunKind] = {cell.kind for cell in cells if cell.kind} or {"federated"}
        where = f"{path}: the cell {' · '.join(axes.values()) or sweep.name}"
        if len(kinds) > 1:
            raise ConfigError(f"{where}: is of kinds {sorted(kinds)} at once; let one axis say the kind.")
        kind = kinds.pop()
        with files.blaming(where, overriding):
            merged, _ = files.apply_settings(raw, [*_settings(sweep, cells), *overriding], options_of, prefix="")
            experiment = with_defaults(files.validate(merged))
            for replicate, drawn in _draws(sweep, experiment):
                parts = build(essential(drawn, kind))
                parts.check_splits()
                planned.append(PlannedRun(axes, drawn.seed, kind, parts.config, replicate))
    check_runs(str(path), sweep.model_dump(), [(run.axes, run.kind, run.id) for run in planned])
    return sweep, planned


def choose(sweep: Sweep, planned: Sequence[PlannedRun], only: Sequence[str]) -> list[PlannedRun]:
    """The runs whose cells are among `only`, on each axis that has one of these names. Raises ConfigError if none has one."""
    cells = {axis.name: {cell.name for cell in axis.cells} for axis in sweep.axes}
    known = set[str]().union(*cells.values())
    for name in only:
        if name not in known:
            raise ConfigError(f"--only {name}: the sweep {sweep.name} has no cell of that name; {suggest(name, known)}")
    chosen = {axis: names & set(only) or names for axis, names in cells.items()}
    return [run for run in planned if all(cell in chosen[axis] for axis, cell in run.axes.items())]


def _draws(sweep: Sweep, experiment: Experiment) -> Iterator[tuple[int | None, Experiment]]:
    """(the number of the replicate, None for seeds; the experiment with its seed and draw)."""
    if sweep.replicates is None:
        yield from ((None, experiment.model_copy(update={"seed": seed})) for seed in sweep.seeds)
        return
    for replicate in range(sweep.replicates):
        draw = place_draw(experiment, replicate)
        task = experiment.task.model_copy(update={"draw": draw})
        yield replicate, experiment.model_copy(update={"seed": draw, "task": task})


class Launcher(Protocol):
    """Starts runs as processes. `command` is what follows `fedmllm`; `file` is the experiment file that it names."""

    def run(self, command: Sequence[str], file: Path) -> tuple[int, str]:
        """(exit status, the last line on stderr). Called from several threads."""

    def stop(self) -> None:
        """End the running processes and start no more."""


class Sweeper:
    """Executes the missing runs of a grid, of those that `choose` leaves; `progress` is called before and after every run."""

    def __init__(
        self, sweep: Sweep, planned: Sequence[PlannedRun], out: Path, progress: ProgressCallback, only: Sequence[str] = ()
    ) -> None:
        self._sweep, self._planned, self._out, self._progress = sweep, planned, out, progress
        self.chosen = choose(sweep, planned, only)
        self._errors: dict[str, str] = {}
        self._running: list[str] = []

    def state(self, planned: PlannedRun) -> str:
        """ "complete", "failed", "cut short" or "new"."""
        directory = RunDir(self._out / planned.id)
        if directory.complete:
            return "complete"
        return "failed" if planned.id in self._errors else "cut short" if directory.exists else "new"

    def rows(self, planned: Sequence[PlannedRun] | None = None) -> list[dict[str, Any]]:
        """The index, or its rows of these runs: one row per cell and seed."""
        return [
            {**p.to_json(), "state": self.state(p)} | ({"error": self._errors[p.id]} if p.id in self._errors else {})
            for p in (self._planned if planned is None else planned)
        ]

    def run(self, jobs: int, launcher: Launcher | None = None) -> list[dict[str, Any]]:
        """Execute all incomplete runs, `jobs` at a time, continuing past failures; the index. Raises KeyboardInterrupt."""
        launcher = launcher or Processes(jobs)
        refusal = RunError(f"{self._out}: another sweep is running there; wait for it, or give another --out.")
        with locked(self._out / ".lock", refusal):
            remove_leftovers(self._out)
            todo = list({p.id: p for p in self.chosen if self.state(p) != "complete"}.values())
            self._write_index()
            self._progress("runs", 0, len(todo), "")
            with ThreadPoolExecutor(max_workers=jobs) as pool:
                futures = {pool.submit(self._execute, p, launcher): p for p in todo}
                try:
                    for done, future in enumerate(as_completed(futures), start=1):
                        future.result()
                        planned = futures[future]
                        self._progress("runs", done, len(todo), f"{planned}: {self._errors.get(planned.id, 'done')}")
                        self._write_index()
                except BaseException:
                    launcher.stop()
                    raise
            return self.rows()

    def _write_index(self) -> None:
        content = {"schema": 1, "name": self._sweep.name, "axes": [a.name for a in self._sweep.axes], "cells": self.rows()}
        content |= {} if self._sweep.margin is None else {"margin": self._sweep.margin}
        write_atomically(self._out / INDEX, (json.dumps(content, indent=2) + "\n").encode())

    def _execute(self, planned: PlannedRun, launcher: Launcher) -> None:
        file, out = self._out / f"{planned.id}.toml", self._out / planned.id
        write_atomically(file, planned.experiment.toml(track=True).encode())
        self._running.append(str(planned))
        self._progress("running", 0, 0, " | ".join(self._running))
        command = ["run"] if planned.kind == "federated" else ["baseline", planned.kind]
        status, message = launcher.run([*command, str(file), "--out", str(out), "--resume", "--json"], file)
        self._running.remove(str(planned))
        if status:
            self._errors[planned.id] = f"exit status {status}: {message}"
