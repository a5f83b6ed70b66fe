"""Reading the files of a data set: finding them, parsing them, and keeping every path inside their folder.

This module holds what all formats share, so that a task's file describes only its own layout. A file that cannot be read at
all raises DataError; a single bad entry becomes a `Problem`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from fedmllm.data.samples import Problem, ProblemKind, Sample, clean
from fedmllm.errors import DataError


class EntryError(DataError):
    """An entry of a file cannot be used as a sample; `kind` is the kind under which it is counted."""

    def __init__(self, what: str, kind: ProblemKind = "wrong value") -> None:
        super().__init__(what)
        self.kind = kind


_BOM = b"\xef\xbb\xbf"


def path_inside(folder: Path, *names: str, absolute: bool = False) -> Path:
    """`folder / names`. Raises EntryError if the path leads out of `folder`.

    A data file may come from anybody: an absolute path, `..` or a symbolic link could otherwise read any image on this
    machine. An absolute name, also in Windows notation, is refused even if it leads inside, unless `absolute` is set because
    a library returns absolute paths.
    """
    path = folder.joinpath(*names)
    shown = "/".join(names)
    kind: ProblemKind = "path outside the folder"
    if not absolute and any(Path(name).is_absolute() or PureWindowsPath(name).drive for name in names):
        raise EntryError(f"the path {shown!r} is absolute; write it relative to {folder}", kind)
    try:
        escapes = not path.resolve().is_relative_to(folder.resolve())
        if not escapes:
            path.is_file()  # raises if the name is too long for a file
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, an unpaired surrogate, a cycle of links
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise EntryError(f"the path {shown[:99]!r} cannot be used ({reason})", "missing picture") from None
    if escapes:
        raise EntryError(f"the path {shown!r} leads out of {folder}; put the file inside", kind)
    return path


def is_file(path: Path) -> bool:
    """Like `Path.is_file`, but False if access is denied or the name is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Like `Path.is_dir`, but False if access is denied or the name is too long."""
    try:
        return path.is_dir()
    except OSError:
        return False


def find_file(task: str, data_dir: str | Path, name: str) -> Path:
    """The file `name` of the unpacked download. Raises DataError, with a suggestion if `data_dir` is one level off."""
    folder = Path(data_dir)
    path = folder / name
    if is_file(path):
        return path
    try:
        neighbours = [folder.resolve().parent, *sorted(child for child in folder.iterdir() if child.is_dir())]
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(
            f"task {task!r}: data_dir = {str(data_dir)!r} is not a readable folder ({reason}); give the folder that contains "
            f"{name!r}."
        ) from None
    near = next((neighbour for neighbour in neighbours if is_file(neighbour / name)), None)
    hint = f"did you mean data_dir = {str(near)!r}?" if near else f"data_dir must be the folder that contains {name!r}."
    raise DataError(f"task {task!r}: there is no file {path}; {hint}")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(_BOM)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error}).")


class _Repeated(str):
    """A key that an object has twice, in place of that object: which of the two values is meant is unknown."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Repeated:
    keys = [key for key, _ in pairs]
    return dict(pairs) if len(set(keys)) == len(keys) else _Repeated(next(key for key in keys if keys.count(key) > 1))


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parse_json(raw: bytes) -> Any:
    """The value of a JSON text. Raises EntryError with the reason alone."""
    try:
        value = _DECODER.decode(raw.decode(json.detect_encoding(raw), "surrogatepass"))
        if b"\\u" in raw or not raw.isascii():
            json.dumps(value, ensure_ascii=False).encode()  # an unpaired surrogate parses, but cannot be encoded
    except (ValueError, RecursionError) as error:
        raise EntryError(str(error), "unreadable entry") from None
    return value


@dataclass(frozen=True)
class Entry:
    """One object of a JSON file or one row of a table. `where` names the file and the position, which is also in `index`."""

    where: str
    values: Mapping[str, Any]
    index: int

    def problem(self, error: EntryError) -> Problem:
        """The entry as a bad sample, with its id if it has one."""
        sample_id = next((f", id {self.values[key]!r}" for key in ("id", "qid", "image_id") if key in self.values), "")
        return Problem(self.where + sample_id, str(error), error.kind)

    def text(self, key: str, required: bool = True) -> str:
        """The value as text without surrounding white space; a number is converted. If it is not required, a missing value
        is ""."""
        value = self.values.get(key)
        if isinstance(value, float) and not math.isfinite(value):
            raise EntryError(f"{key!r} is {value}")
        if value is None and not required:
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise EntryError(f"{key!r} is missing or is neither text nor a number")
        text = str(value).strip()
        if required and not text:
            raise EntryError(f"{key!r} is empty")
        return text


def samples_of(entries: Iterable[Entry | Problem], make: Callable[[Entry], Sample | None]) -> Iterator[Sample | Problem]:
    """Apply `make` to each entry. An entry for which it returns None is left out; one for which it raises EntryError becomes
    a Problem."""
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


def parse_choices(value: Any, subject: str) -> tuple[str, ...]:
    """A list of at least two texts that differ when they are cleaned. Raises EntryError, which begins with `subject`."""
    if not (isinstance(value, list) and len(value) > 1 and all(isinstance(choice, str) and clean(choice) for choice in value)):
        raise EntryError(f"{subject} must be a list of at least two texts")
    choices = tuple(map(clean, value))
    if len(set(choices)) < len(choices):
        twice = next(choice for choice in choices if choices.count(choice) > 1)
        raise EntryError(f"{subject} must not contain the same text twice, and {twice[:40]!r} is")
    return choices


def _entry(path: Path, noun: Literal["line", "index"], index: int, value: Any) -> Entry | Problem:
    where = f"{path}, {noun} {index}"
    if isinstance(value, dict):
        return Entry(where, value, index)
    what = "is not a JSON object" if not isinstance(value, _Repeated) else f"has the key {str(value)!r} twice"
    return Problem(where, f"the {'line' if noun == 'line' else 'entry'} {what}", "unreadable entry")


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, read one by one. Raises DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file):
                yield from (raw.removeprefix(_BOM) if number == 0 else raw).splitlines()
    except OSError as error:
        raise _unreadable(path, error) from None


def _check_lines(path: Path) -> None:
    """Raises DataError for a file of another format, in which every line would be a bad sample."""
    starts = (line.strip() for line in _lines(path) if line.strip())
    first = next(starts, b"")
    if not first or (first.startswith(b"{") and first != b"{"):
        return
    if first.startswith(b"["):
        found = "is a JSON array"
    elif first == b"{":
        found = "holds an object that takes up several lines"
    elif not any(line.startswith(b"{") for line in starts):
        found = f"is no JSON, for its first line is {first[:40].decode(errors='replace')!r}"
    else:
        return
    raise DataError(f'{path}: {found}; write one object per line, such as {{"id": "1", "question": "…", "answer": "…"}}.')


def json_lines(path: Path) -> Iterator[Entry | Problem]:
    """The objects of a file with one JSON object per line. Empty lines are skipped but counted. Raises DataError for a file of
    another format."""
    _check_lines(path)
    for number, raw in enumerate(_lines(path), start=1):
        if not raw.strip():
            continue
        try:
            yield _entry(path, "line", number, _parse_json(raw))
        except EntryError as error:
            yield Problem(f"{path}, line {number}", f"the line is not valid JSON ({error})", error.kind)


def json_list(path: Path) -> list[Entry | Problem]:
    """The objects of a file that is one JSON list. Raises DataError if it is not, for example after an incomplete download."""
    try:
        values = _parse_json(_content(path))
    except EntryError as error:
        raise DataError(f"{path}: not valid JSON, perhaps cut off ({error}); download it again.") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: must be a JSON list of objects; is it a different file of that name?")
    return [_entry(path, "index", index, value) for index, value in enumerate(values)]


def tab_separated(path: Path, columns: tuple[str, ...]) -> Iterator[Entry | Problem]:
    """The rows of a table whose first line names its columns, which must include `columns`.

    Quotation marks are ordinary characters: tweets contain unpaired ones, and a CSV reader would swallow all lines up to the
    next. Raises DataError if a column is missing.
    """
    lines = _content(path).split(b"\n")
    header = lines[0].rstrip(b"\r").decode(errors="replace").split("\t")
    missing = [column for column in columns if column not in header]
    if missing:
        raise DataError(f"{path}, line 1: there is no column {missing[0]!r} among {', '.join(header)}; is it a different file?")
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
