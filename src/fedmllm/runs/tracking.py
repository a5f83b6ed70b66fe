"""What trackers such as TensorBoard or Weights & Biases are told about a run, while it goes on and afterwards.

The trackers are the classes of Accelerate (`accelerate.tracking`). They receive the run's settings and the figures that the
server has about all clients together: no sample, text or id, and nothing about a single client.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from fedmllm.config import TrackTable
from fedmllm.errors import RunError, brief
from fedmllm.kinds import TrackerName
from fedmllm.progress import ProgressCallback
from fedmllm.storage.run_dir import RunDir, new_run

_RUN_NAME = {"clearml": "task_name", "mlflow": "run_name", "swanlab": "experiment_name", "trackio": "name", "wandb": "name"}
"""The argument for the name of the run at each tracker whose first argument is the project."""
_LARGEST = 1e300
"""NaN, infinity and integers that no float holds are not below it."""


def settings_of(table: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Hyper-parameters: the settings by their dotted keys; a list is written as JSON, because trackers accept none."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= settings_of(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat


def figures_of_round(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a line of `rounds.jsonl`: `train/…`, `clients/…`, `bytes/…`, and the metrics as `eval/…`."""
    clock = record.get("clock")
    return _numbers(
        {
            "train": {key: record.get(key) for key in ("loss", "lr", "examples", "steps", "padding", "seconds")},
            "clients": {"sampled": len(record["sampled"]), "refused": len(record["refused"])},
            "bytes": {"up": _sum(record["bytes_up"]), "down": _sum(record["bytes_down"])},
            "privacy": record.get("privacy"),
            "simulated": {"seconds": clock["began"] + clock["seconds"] if clock else None},
            "eval": record.get("metrics"),
        }
    )


def figures_of_result(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of `result.json`: `final/PATTERN/METRIC` with its interval, the spread of the clients, and the sums."""
    return _numbers(
        {
            "final": result.get("metrics"),
            "transfer": {task: tested["metrics"] for task, tested in result.get("transfer", {}).items()},
            "clients": result.get("clients"),
            "total": {
                "bytes_up": _sum(result.get("bytes_up")),
                "bytes_down": _sum(result.get("bytes_down")),
                "seconds": result.get("seconds"),
                "epsilon": (result.get("privacy_spent") or {}).get("epsilon"),
                **{key: result.get(key) for key in ("rounds", "refused_updates", "simulated_seconds", "peak_memory_mb")},
            },
        }
    )


def _numbers(value: Any, key: str = "") -> dict[str, float]:
    """The finite numbers of nested tables, whose keys are joined by "/"; an interval becomes `…_low` and `…_high`."""
    if isinstance(value, Mapping):
        inner = (_numbers(entry, f"{key}/{name}" if key else str(name)) for name, entry in value.items())
        return {name: number for numbers in inner for name, number in numbers.items()}
    if isinstance(value, list | tuple) and len(value) == 2:
        return _numbers(value[0], f"{key}_low") | _numbers(value[1], f"{key}_high")
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
    return {key: float(value)} if is_number else {}


def _sum(table: Any) -> float:
    return sum(_numbers(table).values())


class Tracking:
    """The trackers of one run. Their errors are caught: a tracker that fails is told nothing more, and `failed(name, reason)`
    is called once for it."""

    def __init__(self, table: TrackTable, failed: Callable[[TrackerName, str], None]) -> None:
        self._table, self._failed = table, failed
        self._trackers: dict[TrackerName, Any] = {}

    @contextmanager
    def following(self, run: RunDir) -> Iterator[None]:
        """Begin a new run at every tracker, with the run's settings, and end it with the block."""
        if self._table.trackers:
            about = run.meta() if run.exists else run.result()
            settings = run.settings()
            parameters = settings_of({"run": run.path.name, "kind": about.get("kind"), **settings})
            project = self._table.project or str(settings.get("name", "experiment"))
            for name in self._table.trackers:
                with self._catching(name):
                    tracker = _begin(name, self._table, project, run.path)
                    self._trackers[name] = tracker
                    tracker.store_init_configuration(parameters)
        try:
            yield
        finally:
            for name, tracker in list(self._trackers.items()):
                with self._catching(name):
                    tracker.finish()
            self._trackers.clear()

    def round(self, record: Mapping[str, Any]) -> None:
        """A round was done; the step is the number of rounds that are."""
        if self._trackers:
            self._log(figures_of_round(record), record["round"] + 1)

    def end(self, result: Mapping[str, Any]) -> None:
        """The run was finished."""
        if self._trackers:
            self._log(figures_of_result(result), result.get("rounds", 0))

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._catching(name):
                tracker.log(dict(figures), step=step)

    @contextmanager
    def _catching(self, name: TrackerName) -> Iterator[None]:
        """What a tracker prints goes to standard error, because standard output has the command's result."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # a tracker can raise anything, mostly about its network
            self._trackers.pop(name, None)
            self._failed(name, f"{type(error).__name__}: {brief(' '.join(str(error).split()))}")


def _begin(name: TrackerName, table: TrackTable, project: str, run: Path) -> Any:
    """A tracker of Accelerate that has begun a run."""
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the logger of Accelerate requires it
    options = dict(table.options.get(name, {}))
    folder = Path(table.folder) if table.folder is not None else run
    if name == "tensorboard":  # a new folder each time, as its files in one folder would be shown as one run
        path = new_run(folder, name if table.folder is None else run.name).path
        arguments: list[str] = [path.name, str(folder)]
    elif name == "aim":
        arguments, options = [run.name, str(folder)], {"experiment": project, **options}
    else:
        arguments, options = [project], {_RUN_NAME[name]: run.name, **options} if name in _RUN_NAME else options
        options = {"dir": str(folder / name), **options} if name == "dvclive" else options
    tracker = LOGGER_TYPE_TO_CLASS[name](*arguments, **options)
    tracker.start()
    return tracker


def untracked() -> Tracking:
    """Tracking by nobody."""
    return Tracking(TrackTable(), lambda name, reason: None)


def live(table: TrackTable, run: RunDir, progress: ProgressCallback) -> Tracking:
    """Tracking while the run goes on: a tracker that fails is reported as a note."""

    def failed(name: TrackerName, reason: str) -> None:
        later = f"`fedmllm track {run.path} --with {name}` can tell it all about the run later"
        progress("note", 0, 0, f"{name} failed ({reason}); the run goes on without it, and {later}")

    return Tracking(table, failed)


def replay(run: RunDir, table: TrackTable) -> int:
    """Tell trackers afterwards about a run, finished or not; the number of its rounds. Raises RunError if the directory is not
    a run directory, a file is damaged or of another shape, or a tracker fails."""
    from fedmllm.report.grids import reading

    if not (run.exists or run.complete):
        raise RunError(f"{run.path} is not a run directory.")
    failures: list[str] = []
    tracking, rounds = Tracking(table, lambda name, reason: failures.append(f"{name} failed ({reason})")), run.rounds()
    with reading(run.path), tracking.following(run):
        for record in rounds:
            tracking.round(record)
        if run.complete:
            tracking.end(run.result())
    if failures:
        raise RunError(f"{run.path}: {'; '.join(failures)}; see to what the tracker needs, then repeat the command.")
    return len(rounds)
