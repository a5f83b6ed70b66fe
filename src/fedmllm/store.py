"""Run directories: what a run leaves on disk, written so that a kill at any moment loses at most the round under way.

`result.json` is written last: its presence means that the run is complete.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedmllm.errors import RunError
from fedmllm.tensors import State, load_state, save_state, write_atomically

SCHEMA = 1
"""Version of `result.json`; it grows when a key changes its meaning, not when one is added."""


def _dump(value: Any) -> bytes:
    # Piece by piece: `json.dumps` keeps all pieces of a hundred thousand rows until it joins them.
    content = io.BytesIO()
    text = io.TextIOWrapper(content, encoding="utf-8", newline="\n")
    json.dump(value, text, indent=2, allow_nan=True)
    text.write("\n")
    text.flush()
    return content.getvalue()


class RunDir:
    """The files of one run. Making the object touches nothing."""

    def __init__(self, path: Path) -> None:
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

    def begin(self, config_toml: str, meta: Mapping[str, Any]) -> None:
        """`meta.json` is written after `config.toml`: with it, the directory is a run's."""
        write_atomically(self.config, config_toml.encode())
        write_atomically(self._meta, _dump(meta))

    def meta(self) -> dict[str, Any]:
        return self._read(self._meta)

    def result(self) -> dict[str, Any]:
        """Raises RunError where the run is not complete, or the folder is no run's."""
        if not self.complete:
            state = "is not complete; go on with `fedmllm run … --resume`" if self.exists else "is not a run directory"
            raise RunError(f"{self.path} {state}.")
        return self._read(self._result)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); the run must be made again.") from None
        return value

    # Rounds and the checkpoint

    def rounds(self) -> list[dict[str, Any]]:
        """The records of all whole lines; a line cut by a kill is not one."""
        if not self._rounds.is_file():
            return []
        found = []
        for line in self._rounds.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def save_round(self, record: Mapping[str, Any], state: State, config_digest: str) -> None:
        """First the record, then the checkpoint: a record without its checkpoint is dropped on resume."""
        records = [r for r in self.rounds() if r["round"] < record["round"]] + [dict(record)]
        self._write_lines(self._rounds, records)
        metadata = {"rounds_done": str(record["round"] + 1), "config_digest": config_digest}
        save_state(self._server, state, metadata)

    def load_checkpoint(self) -> tuple[int, State] | None:
        """(rounds done, the server's state after them), or None before the first round's end."""
        if not self._server.is_file():
            return None
        state, metadata = load_state(self._server)
        return int(metadata["rounds_done"]), state

    # Results

    def save_part(self, name: str, value: Mapping[str, Any]) -> None:
        """A finished piece of a run that has no rounds, kept for resuming."""
        write_atomically(self.checkpoint / f"{name}.json", _dump(value))

    def load_part(self, name: str) -> dict[str, Any] | None:
        path = self.checkpoint / f"{name}.json"
        return self._read(path) if path.is_file() else None

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
        write_atomically(self._result, _dump(result))

    def _write_lines(self, path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
        write_atomically(path, "".join(json.dumps(line, allow_nan=True) + "\n" for line in lines).encode())


def new_run(parent: Path, stem: str) -> RunDir:
    """`parent/stem`, or with -2, -3, … where that is taken: a run never writes over another."""
    number = 1
    while True:
        path = parent / (stem if number == 1 else f"{stem}-{number}")
        if not path.exists():
            return RunDir(path)
        number += 1


def unfinished(parent: Path, stem: str, config_digest: str) -> RunDir | None:
    """The latest incomplete run of this experiment under `parent`."""
    pattern = re.compile(re.escape(stem) + r"(-\d+)?")
    # Not glob(stem): a name may hold a bracket or a star.
    runs = [RunDir(path) for path in parent.glob("*") if path.is_dir() and pattern.fullmatch(path.name)]
    mine = [run for run in runs if run.exists and not run.complete and run.meta().get("config_digest") == config_digest]
    return max(mine, key=lambda run: run.config.stat().st_mtime, default=None)
