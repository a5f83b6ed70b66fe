"""The checkpoint of a run and the records of its rounds, which are written and checked together.

Two checkpoints are kept, each with a digest of its content and one of the records before it: if a disk damages the latest one,
or a record that only the latest one needs, the run continues from the one before. Files of earlier versions have no digests;
of theirs, only the numbers of rounds are compared.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmllm.errors import RunError
from fedmllm.storage.atomic import explaining_full_disk, write_atomically
from fedmllm.storage.state_file import DIGEST, load_verified, save_state
from fedmllm.storage.strict_json import dump, json_line, parse_object

if TYPE_CHECKING:
    from fedmllm.tensors import State


class Checkpoint:
    """`folder` has the checkpoints, `rounds` is the file of the records, one line a round. The constructor does not touch the
    disk."""

    def __init__(self, folder: Path, rounds: Path) -> None:
        self._folder, self._rounds = folder, rounds
        self._latest, self._previous = folder / "server.safetensors", folder / "previous.safetensors"
        self._next_round: int | None = None  # the round whose record can be appended to the file without rewriting it
        self._records = hashlib.sha256()  # of the lines before it
        self._keeps_latest = True  # whether the latest checkpoint is good enough to become the previous one

    def records(self) -> list[dict[str, Any]]:
        """The records from the first to the last before a damaged or unfinished line."""
        return [record for _, record in self._lines()]

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """(line, record) of each round from the first to the last before a damaged line."""
        intact: list[tuple[bytes, dict[str, Any]]] = []
        if self._rounds.is_file():
            for line in self._rounds.read_bytes().splitlines(keepends=True):
                try:
                    record = parse_object(line.decode())
                except ValueError:
                    break
                if record.get("round") != len(intact) or not line.endswith(b"\n"):
                    break
                intact.append((line, record))
        return intact

    def save(self, record: dict[str, Any], state: State, config_digest: str) -> None:
        """Write the record of a round, which replaces those of this and later rounds, then the checkpoint. Raises OSError."""
        # The record is written before the checkpoint: a record without its checkpoint is dropped on resume.
        line, number = json_line(record).encode(), int(record["round"])
        if number == self._next_round:
            self._append_record(line)
        else:
            earlier = b"".join(line for line, _ in self._lines()[:number])
            write_atomically(self._rounds, earlier + line)
            self._records = hashlib.sha256(earlier)
        self._records.update(line)
        self._next_round = number + 1
        metadata = {"rounds_done": str(self._next_round), "config_digest": config_digest}
        metadata["records_sha256"] = self._records.hexdigest()
        save_state(self._latest, state, metadata, self._previous if self._keeps_latest else None)
        self._keeps_latest = True

    def _append_record(self, line: bytes) -> None:
        size = self._rounds.stat().st_size
        try:
            with explaining_full_disk(self._rounds, len(line)), self._rounds.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.truncate(self._rounds, size)
            raise

    def load(self, notes: list[str]) -> tuple[int, State] | None:
        """(rounds done, the server's state after them), or None if there is no checkpoint. A sentence about one that cannot be
        used is added to `notes`. Raises RunError if there are only such."""
        problems: list[str] = []
        # Between two renames, only the previous one exists.
        for path in filter(Path.is_file, (self._latest, self._previous)):
            try:
                done, state = self._load_agreeing(path)
            except ValueError as error:
                problems.append(f"{path} {error}")
                continue
            if problems:
                self._keeps_latest = False
                note = f"{problems[0]}; the run continues from {path.name}, which was saved after {done} rounds"
                notes += [note] if note not in notes else []
            return done, state
        if problems:
            raise RunError(
                f"{'; '.join(problems)}; restore the file from a copy, or delete {self._folder} to train this run again from "
                "its first round."
            )
        return None

    def _load_agreeing(self, path: Path) -> tuple[int, State]:
        """The content of a checkpoint. Raises ValueError, whose message continues the path, if it cannot be used."""
        from fedmllm.tensors import unflatten

        try:
            flat, metadata = load_verified(path)
            done = int(metadata["rounds_done"])
        except (ValueError, KeyError) as error:
            raise ValueError(f"is damaged ({error})") from None
        lines = [line for line, _ in self._lines()][:done]
        if len(lines) < done:
            raise ValueError(f"was saved after {done} rounds, and {self._rounds.name} has intact records of {len(lines)}")
        if metadata.get("records_sha256") not in (None, hashlib.sha256(b"".join(lines)).hexdigest()):
            raise ValueError(f"does not belong to the records in {self._rounds.name}, which were changed")
        return done, unflatten(flat)

    def save_part(self, name: str, value: Mapping[str, Any]) -> None:
        write_atomically(self._folder / f"{name}.json", dump({**value, DIGEST: _digest(value)}))

    def load_part(self, name: str, notes: list[str]) -> dict[str, Any] | None:
        path = self._folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            part = parse_object(path.read_text(encoding="utf-8"))
            if part.pop(DIGEST, None) not in (None, _digest(part)):
                raise ValueError("its content does not match its digest")
        except (OSError, ValueError) as error:
            notes.append(f"{path} is damaged ({error}); {name} is trained again")
            return None
        return part


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(dump(value)).hexdigest()
