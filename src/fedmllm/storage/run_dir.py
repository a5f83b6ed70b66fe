"""Run directories: what a run leaves on disk, written so that a kill at any moment loses at most the round under way and the
one before it, whose checkpoint may still be on its way to the disk.

`result.json` is written last: its presence means that the run is complete.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmllm.errors import RunError
from fedmllm.storage.atomic import write_atomically
from fedmllm.storage.lock import Lock
from fedmllm.storage.state_file import load_state, save_state
from fedmllm.storage.strict_json import dump, json_line, restored

if TYPE_CHECKING:
    from fedmllm.tensors import State

SCHEMA = 1
"""Version of `result.json`; it grows when a key changes its meaning, not when one is added."""


class _Writer:
    """Writes in the background, one thing at a time in the order asked, at most one ahead."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Raises what went wrong with the write before, which is finished then."""
        self.wait()
        # A thread of the pool, unlike a daemon, is waited for when the interpreter leaves: Ctrl-C loses no checkpoint.
        self._pool = self._pool or ThreadPoolExecutor(1, "checkpoint")
        self._under_way = self._pool.submit(write)

    def wait(self) -> None:
        last, self._under_way = self._under_way, None
        if last is not None:
            last.result()


class RunDir:
    """The files of one run. Making the object touches nothing."""

    def __init__(self, path: Path, others: Iterator[Path] | None = None) -> None:
        """`others` are for a new run, endless: the directories to take where another run takes `path` before `claimed` does."""
        self._others = others
        self._writer = _Writer()
        self._next_round: int | None = None  # the one whose record goes at the end of the file as it is
        self._at(path)

    def _at(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.manifest = path / "manifest.parquet"
        self.adapter = path / "adapter"
        self.adapters = path / "adapters"
        self.checkpoint = path / "checkpoint"
        self._result = path / "result.json"
        self._meta = path / "meta.json"
        self._rounds = path / "rounds.jsonl"
        self._server = self.checkpoint / "server.safetensors"

    @property
    def complete(self) -> bool:
        return self._result.is_file()

    @property
    def exists(self) -> bool:
        return self._meta.is_file()

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the directory, and hold it against all other processes.

        A new run whose directory another took meanwhile moves on to one that is free. Raises RunError for any other
        directory that a process is at work in.
        """
        lock = self._take()
        try:
            yield
            self._writer.wait()
        finally:
            with contextlib.suppress(Exception):  # of the error that ended the run, the first is told
                self._writer.wait()
            lock.release()

    def _take(self) -> Lock:
        while True:
            lock = Lock(self.path / "run.lock")
            if lock.take():
                if self._others is None or not self.config.exists():
                    self._others = None
                    return lock
                lock.release()
            if self._others is None:
                raise RunError(f"{self.path}: another process is at work on this run; wait for its end, or give another --out.")
            self._at(next(path for path in self._others if not path.exists()))

    def begin(self, config_toml: str, meta: Mapping[str, Any]) -> None:
        """`meta.json` is written after `config.toml`: with it, the directory is a run's."""
        write_atomically(self.config, config_toml.encode())
        write_atomically(self._meta, dump(meta))

    def meta(self) -> dict[str, Any]:
        return self._read(self._meta)

    def result(self) -> dict[str, Any]:
        """Raises RunError where the run is not complete, or the folder is no run's."""
        if not self.complete:
            state = "is not complete; go on with `fedmllm run … --resume`" if self.exists else "is not a run directory"
            raise RunError(f"{self.path} {state}.")
        return restored(self._read(self._result))

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); the run must be made again.") from None
        return value

    # Rounds and the checkpoint

    def rounds(self) -> list[dict[str, Any]]:
        """The records of all whole lines; a line cut by a kill is not one."""
        self._writer.wait()
        return self._whole_lines()

    def _whole_lines(self) -> list[dict[str, Any]]:
        if not self._rounds.is_file():
            return []
        found = []
        for line in self._rounds.read_text(encoding="utf-8").splitlines():
            try:
                found.append(restored(json.loads(line)))
            except ValueError:
                break
        return found

    def save_round(self, record: Mapping[str, Any], state: State, config_digest: str) -> None:
        """Begin to write a round's record and checkpoint; neither argument may change afterwards.

        The round before is safe on disk when this returns. Raises OSError where that could not be written.
        """
        self._writer.submit(lambda: self._save_round(dict(record), state, config_digest))

    def _save_round(self, record: dict[str, Any], state: State, config_digest: str) -> None:
        # First the record, then the checkpoint: a record without its checkpoint is dropped on resume.
        if record["round"] == self._next_round:
            with self._rounds.open("a", encoding="utf-8") as file:
                file.write(json_line(record))
                file.flush()
                os.fsync(file.fileno())
        else:
            kept = [r for r in self._whole_lines() if r["round"] < record["round"]]
            self._write_lines(self._rounds, [*kept, record])
        self._next_round = record["round"] + 1
        metadata = {"rounds_done": str(self._next_round), "config_digest": config_digest}
        save_state(self._server, state, metadata)

    def load_checkpoint(self) -> tuple[int, State] | None:
        """(rounds done, the server's state after them), or None before the first round's end."""
        self._writer.wait()
        if not self._server.is_file():
            return None
        state, metadata = load_state(self._server)
        return int(metadata["rounds_done"]), state

    # Results

    def save_part(self, name: str, value: Mapping[str, Any]) -> None:
        """A finished piece of a run that has no rounds, kept for resuming."""
        write_atomically(self.checkpoint / f"{name}.json", dump(value))

    def load_part(self, name: str) -> dict[str, Any] | None:
        path = self.checkpoint / f"{name}.json"
        return restored(self._read(path)) if path.is_file() else None

    def save_predictions(self, predictions: Iterable[Mapping[str, Any]]) -> None:
        self._write_lines(self.path / "predictions.jsonl", predictions)

    def predictions(self) -> list[dict[str, Any]]:
        """A row a test question and pattern. Raises RunError where the file is gone or damaged."""
        path = self.path / "predictions.jsonl"
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); the run must be made again.") from None

    def save_judgements(self, judgements: Iterable[Mapping[str, Any]]) -> None:
        self._write_lines(self.path / "judgements.jsonl", judgements)

    def finish(self, result: Mapping[str, Any]) -> None:
        self._writer.wait()
        write_atomically(self._result, dump(result))

    def _write_lines(self, path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
        write_atomically(path, "".join(map(json_line, lines)).encode())


def new_run(parent: Path, stem: str) -> RunDir:
    """`parent/stem`, or with -2, -3, … where that is taken: a run never writes over another."""
    names = (parent / (stem if number == 1 else f"{stem}-{number}") for number in itertools.count(1))
    return RunDir(next(path for path in names if not path.exists()), names)


def unfinished(parent: Path, stem: str, config_digest: str) -> RunDir | None:
    """The latest incomplete run of this experiment under `parent`."""
    pattern = re.compile(re.escape(stem) + r"(-\d+)?")
    # Not glob(stem): a name may hold a bracket or a star.
    runs = [RunDir(path) for path in parent.glob("*") if path.is_dir() and pattern.fullmatch(path.name)]
    mine = [run for run in runs if run.exists and not run.complete and run.meta().get("config_digest") == config_digest]
    return max(mine, key=lambda run: run.config.stat().st_mtime, default=None)
