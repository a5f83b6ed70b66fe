"""Run directories: the files of a run, written so that a kill at any moment loses little work.

At most two rounds are lost: the one in progress, and the one before it if its checkpoint is still being written.
`result.json` is written last: its presence means that the run is complete.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedmllm.errors import RunError
from fedmllm.storage.atomic import remove_leftovers, write_atomically
from fedmllm.storage.checkpoint import Checkpoint
from fedmllm.storage.lock import FileLock
from fedmllm.storage.strict_json import dump, json_line, parse_object

if TYPE_CHECKING:
    from fedmllm.tensors import State

SCHEMA = 1
"""Version of `result.json`. It changes if a key changes its meaning, not if a key is added."""

T = TypeVar("T")
_COPY = "restore it from a copy, or start a new run"
_AGAIN = "restore it from a copy, or delete it and give the run's command again with --resume"


class RunDir:
    """The files of one run. The constructor does not touch the disk."""

    def __init__(self, path: Path, alternatives: Iterator[Path] | None = None) -> None:
        """`alternatives` is given for a new run: an endless iterator over the directories to try if another run takes `path`
        before `claimed` does."""
        self._alternatives = alternatives
        # Unlike a daemon thread, a pool's thread is joined when the interpreter exits: Ctrl-C loses no checkpoint.
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self.notes: list[str] = []
        """What was found damaged and what is done instead, for the user; the caller shows and removes them."""
        self._set_path(path)

    def _set_path(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.manifest = path / "manifest.parquet"
        self.adapter = path / "adapter"
        self.adapters = path / "adapters"
        self.checkpoint = path / "checkpoint"
        self.log = path / "run.log"
        self._result = path / "result.json"
        self._meta = path / "meta.json"
        self._rounds = path / "rounds.jsonl"
        self._predictions = path / "predictions.jsonl"
        self._progress = Checkpoint(self.checkpoint, self._rounds)

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
        another process is working on the run. Temporary files of killed processes are removed.
        """
        lock = self._acquire_lock()
        try:
            remove_leftovers(self.path, "**/*")
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
        """The content of `meta.json`. Raises RunError if it is damaged, as the other readers do for their files."""
        return _parsed(self._meta, parse_object, _COPY)

    def settings(self) -> dict[str, Any]:
        """The content of `config.toml`."""
        return _parsed(self.config, tomllib.loads, _COPY)

    def result(self) -> dict[str, Any]:
        """The content of `result.json`. Raises RunError if it is damaged, if the run is not complete, or if the folder is not
        a run directory."""
        if not self.complete:
            state = "is not complete; continue it with `fedmllm run … --resume`" if self.exists else "is not a run directory"
            raise RunError(f"{self.path} {state}.")
        return _parsed(self._result, _parse_result, _AGAIN)

    # Rounds and the checkpoint

    def rounds(self) -> list[dict[str, Any]]:
        """The records of the rounds; a line cut off by a kill is ignored. Raises RunError if a complete run lacks records."""
        self._wait()
        records = self._progress.records()
        if self.complete and self._rounds.is_file() and len(records) < (rounds := self.result().get("rounds", 0)):
            raise RunError(f"{self._rounds} is damaged (line {len(records) + 1} of {rounds} is missing or changed); {_COPY}.")
        return records

    def save_round(self, record: Mapping[str, Any], state: State, config_digest: str) -> None:
        """Start writing a round's record and checkpoint in the background; `record` and `state` must not change afterwards.

        The previous round is safely on disk when this returns. Raises OSError if it could not be written, which is DiskFull
        for want of space.
        """
        self._wait()
        self._writer = self._writer or ThreadPoolExecutor(1, "checkpoint")
        self._pending = self._writer.submit(self._progress.save, dict(record), state, config_digest)

    def _wait(self) -> None:
        """Wait until the latest round is written, and raise the writer's error if that failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load_checkpoint(self) -> tuple[int, State] | None:
        """(rounds done, the server's state after them), or None before the end of the first round.

        If the latest checkpoint is damaged or does not agree with `rounds.jsonl`, the one before is used, and `notes` says so.
        Raises RunError if neither can be used.
        """
        self._wait()
        return self._progress.load(self.notes)

    def save_part(self, name: str, value: Mapping[str, Any]) -> None:
        """Save a finished piece of a run without rounds, for resuming."""
        self._progress.save_part(name, value)

    def load_part(self, name: str) -> dict[str, Any] | None:
        """A saved piece; None if there is none, or if it is damaged and must be made again, which `notes` then says."""
        return self._progress.load_part(name, self.notes)

    # Results

    def save_predictions(self, predictions: Iterable[Mapping[str, Any]]) -> None:
        _write_lines(self._predictions, predictions)

    def predictions(self) -> list[dict[str, Any]]:
        """One row per test question and pattern. Raises RunError if the file is missing or damaged."""
        return _parsed(self._predictions, lambda text: [parse_object(line) for line in text.splitlines()], _COPY)

    def save_judgements(self, judgements: Iterable[Mapping[str, Any]]) -> None:
        _write_lines(self.path / "judgements.jsonl", judgements)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, which completes the run."""
        self._wait()
        write_atomically(self._result, dump(result))


def _parsed(path: Path, parse: Callable[[str], T], remedy: str) -> T:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error}); {remedy}.") from None


def _parse_result(text: str) -> dict[str, Any]:
    from fedmllm.storage.shapes import check_result  # the help page must not wait for pydantic

    result = parse_object(text)
    check_result(result)
    return result


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(map(json_line, lines)).encode())


def new_run(parent: Path, stem: str) -> RunDir:
    """`parent/stem`, or with -2, -3, … if that exists: a run never overwrites another."""
    paths = (parent / (stem if number == 1 else f"{stem}-{number}") for number in itertools.count(1))
    return RunDir(next(path for path in paths if not path.exists()), paths)


def unfinished(parent: Path, stem: str, config_digest: str, notes: list[str] | None = None) -> RunDir | None:
    """The latest incomplete run of this experiment under `parent`. A run whose `meta.json` is damaged is passed over, and a
    sentence about it is added to `notes`."""
    pattern = re.compile(re.escape(stem) + r"(-\d+)?")
    # Not glob(stem): a name may contain a bracket or an asterisk.
    runs = [RunDir(path) for path in parent.glob("*") if path.is_dir() and pattern.fullmatch(path.name)]
    matching = []
    for run in runs:
        if run.exists and run.config.is_file() and not run.complete:
            try:
                matching += [run] if run.meta().get("config_digest") == config_digest else []
            except RunError as error:
                (notes if notes is not None else []).append(f"{error} This run is passed over.")
    return max(matching, key=lambda run: run.config.stat().st_mtime, default=None)
