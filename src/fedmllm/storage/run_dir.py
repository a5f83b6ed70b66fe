"""Run directories: the files of a run, written so that a kill at any moment loses little work.

At most two rounds are lost: the one in progress, and the one before it if its checkpoint is still being written.
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
from fedmllm.storage.lock import FileLock
from fedmllm.storage.state_file import load_state, save_state
from fedmllm.storage.strict_json import dump, json_line, restored

if TYPE_CHECKING:
    from fedmllm.tensors import State

SCHEMA = 1
"""Version of `result.json`. It changes if a key changes its meaning, not if a key is added."""


class RunDir:
    """The files of one run. The constructor does not touch the disk."""

    def __init__(self, path: Path, alternatives: Iterator[Path] | None = None) -> None:
        """`alternatives` is given for a new run: an endless iterator over the directories to try if another run takes `path`
        before `claimed` does."""
        self._alternatives = alternatives
        # Unlike a daemon thread, a pool's thread is joined when the interpreter exits: Ctrl-C loses no checkpoint.
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._next_round: int | None = None  # the round whose record can be appended to the file without rewriting it
        self._set_path(path)

    def _set_path(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.manifest = path / "manifest.parquet"
        self.adapter = path / "adapter"
        self.adapters = path / "adapters"
        self.checkpoint = path / "checkpoint"
        self._result = path / "result.json"
        self._meta = path / "meta.json"
        self._rounds = path / "rounds.jsonl"
        self._predictions = path / "predictions.jsonl"
        self._server = self.checkpoint / "server.safetensors"

    @property
    def complete(self) -> bool:
        return self._result.is_file()

    @property
    def exists(self) -> bool:
        return self._meta.is_file()

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Create the directory and lock it against all other processes.

        A new run whose directory was taken in the meantime moves on to the next free one. Otherwise, raises RunError if
        another process is working on the run.
        """
        lock = self._acquire_lock()
        try:
            yield
            self._wait()
        finally:
            with contextlib.suppress(Exception):  # if the block raised, report that error and not the writer's
                self._wait()
            lock.release()

    def _acquire_lock(self) -> FileLock:
        while True:
            lock = FileLock(self.path / "run.lock")
            if lock.acquire():
                if self._alternatives is None or not self.config.exists():
                    self._alternatives = None
                    return lock
                lock.release()
            if self._alternatives is None:
                raise RunError(
                    f"{self.path}: another process is working on this run; wait until it ends, or give another --out."
                )
            self._set_path(next(path for path in self._alternatives if not path.exists()))

    def begin(self, config_toml: str, meta: Mapping[str, Any]) -> None:
        """Write `config.toml`, then `meta.json`, whose presence makes the directory a run directory."""
        write_atomically(self.config, config_toml.encode())
        write_atomically(self._meta, dump(meta))

    def meta(self) -> dict[str, Any]:
        content: dict[str, Any] = _parsed(self._meta)
        return content

    def result(self) -> dict[str, Any]:
        """The content of `result.json`. Raises RunError if the run is not complete or the folder is not a run directory."""
        if not self.complete:
            state = "is not complete; continue it with `fedmllm run … --resume`" if self.exists else "is not a run directory"
            raise RunError(f"{self.path} {state}.")
        return restored(_parsed(self._result))

    # Rounds and the checkpoint

    def rounds(self) -> list[dict[str, Any]]:
        """The records of all complete lines; a line cut off by a kill is ignored."""
        self._wait()
        return self._complete_lines()

    def _complete_lines(self) -> list[dict[str, Any]]:
        if not self._rounds.is_file():
            return []
        records = []
        for line in self._rounds.read_text(encoding="utf-8").splitlines():
            try:
                records.append(restored(json.loads(line)))
            except ValueError:
                break
        return records

    def save_round(self, record: Mapping[str, Any], state: State, config_digest: str) -> None:
        """Start writing a round's record and checkpoint in the background; `record` and `state` must not change afterwards.

        The previous round is safely on disk when this returns. Raises OSError if it could not be written.
        """
        self._wait()
        self._writer = self._writer or ThreadPoolExecutor(1, "checkpoint")
        self._pending = self._writer.submit(self._save_round, dict(record), state, config_digest)

    def _wait(self) -> None:
        """Wait until the latest round is written, and raise the writer's error if that failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _save_round(self, record: dict[str, Any], state: State, config_digest: str) -> None:
        # The record is written before the checkpoint: a record without its checkpoint is dropped on resume.
        if record["round"] == self._next_round:
            with self._rounds.open("a", encoding="utf-8") as file:
                file.write(json_line(record))
                file.flush()
                os.fsync(file.fileno())
        else:
            earlier = [r for r in self._complete_lines() if r["round"] < record["round"]]
            _write_lines(self._rounds, [*earlier, record])
        self._next_round = record["round"] + 1
        metadata = {"rounds_done": str(self._next_round), "config_digest": config_digest}
        save_state(self._server, state, metadata)

    def load_checkpoint(self) -> tuple[int, State] | None:
        """(rounds done, the server's state after them), or None before the end of the first round."""
        self._wait()
        if not self._server.is_file():
            return None
        state, metadata = load_state(self._server)
        return int(metadata["rounds_done"]), state

    # Results

    def save_part(self, name: str, value: Mapping[str, Any]) -> None:
        """Save a finished piece of a run without rounds, for resuming."""
        write_atomically(self.checkpoint / f"{name}.json", dump(value))

    def load_part(self, name: str) -> dict[str, Any] | None:
        path = self.checkpoint / f"{name}.json"
        return restored(_parsed(path)) if path.is_file() else None

    def save_predictions(self, predictions: Iterable[Mapping[str, Any]]) -> None:
        _write_lines(self._predictions, predictions)

    def predictions(self) -> list[dict[str, Any]]:
        """One row per test question and pattern. Raises RunError if the file is missing or damaged."""
        rows: list[dict[str, Any]] = _parsed(self._predictions, lambda text: [json.loads(line) for line in text.splitlines()])
        return rows

    def save_judgements(self, judgements: Iterable[Mapping[str, Any]]) -> None:
        _write_lines(self.path / "judgements.jsonl", judgements)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, which completes the run."""
        self._wait()
        write_atomically(self._result, dump(result))


def _parsed(path: Path, parse: Callable[[str], Any] = json.loads) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); the run must be repeated.") from None


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(map(json_line, lines)).encode())


def new_run(parent: Path, stem: str) -> RunDir:
    """`parent/stem`, or with -2, -3, … if that exists: a run never overwrites another."""
    paths = (parent / (stem if number == 1 else f"{stem}-{number}") for number in itertools.count(1))
    return RunDir(next(path for path in paths if not path.exists()), paths)


def unfinished(parent: Path, stem: str, config_digest: str) -> RunDir | None:
    """The latest incomplete run of this experiment under `parent`."""
    pattern = re.compile(re.escape(stem) + r"(-\d+)?")
    # Not glob(stem): a name may contain a bracket or an asterisk.
    runs = [RunDir(path) for path in parent.glob("*") if path.is_dir() and pattern.fullmatch(path.name)]
    matching = [run for run in runs if run.exists and not run.complete and run.meta().get("config_digest") == config_digest]
    return max(matching, key=lambda run: run.config.stat().st_mtime, default=None)
