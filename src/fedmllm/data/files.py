"""Reading the files of a data set: where they are, what is in them, and no way out of their folder.

What holds for all formats is here, so that a task's file says only what its own layout is. A file that cannot be read at
all is a DataError; one entry of it that cannot is a `Problem`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from fedmllm.data.samples import Problem, ProblemKind, Sample
from fedmllm.errors import DataError


class EntryError(ValueError):
    """One entry of a file cannot be a sample; `kind` groups it with others of its sort."""

    def __init__(self, what: str, kind: ProblemKind = "wrong value") -> None:
        super().__init__(what)
        self.kind = kind


def inside(folder: Path, *names: str, absolute: bool = False) -> Path:
    """`folder / names`, wherever its file is. Raises EntryError where that would be outside of `folder`.

    A data file is somebody else's: an absolute path, `..`, or a symbolic link could otherwise read any picture here. Names
    are joined one after the other; an absolute one, also in the way of Windows, is refused even where it leads inside,
    unless `absolute` says that a library makes them so.
    """
    path = folder.joinpath(*names)
    shown = "/".join(names)
    kind: ProblemKind = "path outside the folder"
    if not absolute and any(Path(name).is_absolute() or PureWindowsPath(name).drive for name in names):
        raise EntryError(f"the path {shown!r} is absolute; write it relative to {folder}", kind)
    try:
        leaves = not path.resolve().is_relative_to(folder.resolve())
        if not leaves:
            path.is_file()  # raises where the name is too long for a file
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, half a surrogate pair, links in a circle
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise EntryError(f"the path {shown[:99]!r} cannot be used ({reason})", "missing picture") from None
    if leaves:
        raise EntryError(f"the path {shown!r} leads out of {folder}; put the file inside", kind)
    return path


def is_file(path: Path) -> bool:
    """As `Path.is_file`, and False where one may not look or the name is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def find(task: str, data_dir: str | Path, name: str) -> Path:
    """The file `name` of the unpacked download. Raises DataError, with a guess where `data_dir` is a level off."""
    folder = Path(data_dir)
    path = folder / name
    if is_file(path):
        return path
    try:
        around = [folder.resolve().parent, *sorted(child for child in folder.iterdir() if child.is_dir())]
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(
            f"task {task!r}: data_dir = {str(data_dir)!r} is no folder that can be read ({reason}); give the one that holds "
            f"{name!r}."
        ) from None
    near = next((other for other in around if is_file(other / name)), None)
    hint = f"did you mean data_dir = {str(near)!r}?" if near else f"data_dir must be the folder that holds {name!r}."
    raise DataError(f"task {task!r}: there is no file {path}; {hint}")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from None


def parse(raw: bytes) -> Any:
    """The value of a JSON text. Raises EntryError."""
    try:
        value = json.loads(raw)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair parses, but is no text
    except (ValueError, RecursionError) as error:
        raise EntryError(f"the line is not valid JSON ({error})", "unreadable entry") from None
    return value


@dataclass(frozen=True)
class Entry:
    """One object of a JSON file or one row of a table: `where` names the file and `index`, the line or the place in a list."""

    where: str
    values: Mapping[str, Any]
    index: int

    def problem(self, error: EntryError) -> Problem:
        """The entry as a bad sample, named by what its layout calls the id."""
        known = next((f", id {self.values[key]!r}" for key in ("id", "qid", "image_id") if key in self.values), "")
        return Problem(self.where + known, str(error), error.kind)

    def text(self, key: str, required: bool = True) -> str:
        """The value as text without space around it; a number is written out. "" for what is not there and need not be."""
        value = self.values.get(key)
        if isinstance(value, float) and not math.isfinite(value):
            raise EntryError(f"{key!r} is {value}")
        if value is None and not required:
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise EntryError(f"{key!r} is missing or is neither text nor a number")
        found = str(value).strip()
        if required and not found:
            raise EntryError(f"{key!r} is empty")
        return found


def samples_of(entries: Iterable[Entry | Problem], make: Callable[[Entry], Sample | None]) -> Iterator[Sample | Problem]:
    """`make` of each entry; None leaves it out, and EntryError makes it a Problem."""
    for entry in entries:
        if isinstance(entry, Problem):
            yield entry
            continue
        try:
            sample = make(entry)
        except EntryError as error:
            yield entry.problem(error)
            continue
        if sample is not None:
            yield sample


def _entry(path: Path, noun: Literal["line", "index"], index: int, value: Any) -> Entry | Problem:
    where = f"{path}, {noun} {index}"
    if isinstance(value, dict):
        return Entry(where, value, index)
    return Problem(where, f"the {'line' if noun == 'line' else 'entry'} is not a JSON object", "unreadable entry")


def json_lines(path: Path) -> Iterator[Entry | Problem]:
    """The objects of a file with one JSON object a line; empty lines count as lines."""
    for number, raw in enumerate(_content(path).splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            yield _entry(path, "line", number, parse(raw))
        except EntryError as error:
            yield Problem(f"{path}, line {number}", str(error), error.kind)


def json_list(path: Path) -> list[Entry | Problem]:
    """The objects of a file that is one JSON list. Raises DataError where it is none, such as after a broken download."""
    try:
        values = parse(_content(path))
    except EntryError as error:
        reason = str(error).removeprefix("the line is not valid JSON (").removesuffix(")")
        raise DataError(f"{path}: not valid JSON, perhaps cut off ({reason}); download it again.") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: must be a JSON list of objects; is it another file of that name?")
    return [_entry(path, "index", index, value) for index, value in enumerate(values)]


def tab_separated(path: Path, columns: tuple[str, ...]) -> Iterator[Entry | Problem]:
    """The rows of a table whose first line names its columns, `columns` at least.

    Quotes are characters like any other: tweets hold single ones, and a CSV reader would swallow lines up to the next.
    Raises DataError where a column is missing.
    """
    lines = _content(path).split(b"\n")
    header = lines[0].rstrip(b"\r").decode(errors="replace").split("\t")
    lacking = [column for column in columns if column not in header]
    if lacking:
        raise DataError(f"{path}, line 1: there is no column {lacking[0]!r} among {', '.join(header)}; is it another file?")
    for number, raw in enumerate(lines[1:], start=2):
        if not raw.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = raw.rstrip(b"\r").decode().split("\t")
        except UnicodeDecodeError as error:
            yield Problem(where, f"the line is not UTF-8 ({error})", "unreadable entry")
            continue
        if len(fields) != len(header):
            yield Problem(where, f"the line has {len(fields)} fields, not {len(header)}", "unreadable entry")
            continue
        yield Entry(where, dict(zip(header, fields, strict=True)), number)
