"""Atomic writes: a reader sees the old file or the new one, never a part of either."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fedmllm.errors import RunError

_LONGEST_NAME = 255  # bytes of one part of a path, on all common file systems
_LONGEST_STEM = 200  # the names of a run's folder and files add their kind, seed and number


def usable_as_folder(name: str) -> str:
    """The name, if it can be that of a new folder in any given one. Raises ValueError."""
    if not name.isprintable() or name != name.strip() or not name or any(c in name for c in "/\\") or name.startswith("."):
        raise ValueError("must be usable as a folder's name")
    if len(name.encode(errors="replace")) > _LONGEST_STEM:
        raise ValueError(f"must have at most {_LONGEST_STEM} bytes, because a file's name has at most {_LONGEST_NAME}")
    return name


_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp", re.DOTALL)


class DiskFull(OSError):  # noqa: N818 (named after the event, as TimeoutError's siblings are)
    """A file could not be written for want of space; its message says which, and what to do."""


def check_folder(folder: Path) -> None:
    """Check, before any work is done, that the folder is one that can be written to, or can be made. Raises RunError."""
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in folder.parts):
        raise RunError(f"{folder}: the name of a file or folder has at most {_LONGEST_NAME} bytes; choose a shorter one.")
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise RunError(f"nothing can be written to {folder}, because {existing} is a file; choose another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(
            f"nothing can be written to {folder}, because this user may not write to {existing}; choose another folder."
        )


@contextlib.contextmanager
def explaining_full_disk(path: Path, size: int | None = None) -> Iterator[None]:
    """Raise DiskFull in place of the block's errors about space. `size` is the number of bytes to write, if it is known."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = "" if size is None else f" ({size:,} bytes are needed)"
        raise DiskFull(
            f"{path} cannot be written, because the disk or the quota is full{needed}; free some space and give the same "
            "command again, a run with --resume."
        ) from error


@contextlib.contextmanager
def atomic_file(path: Path, size: int | None = None, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing. On success it is flushed to disk and renamed to `path`, and what was
    there before is renamed to `previous` if that is given; if the block raises, the temporary file is removed.

    `size` is the number of bytes to write, if it is known. Raises DiskFull.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explaining_full_disk(path, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                path.replace(previous)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Flush the names of the files in a folder to disk: without it, a power failure can undo a rename."""
    with contextlib.suppress(OSError):  # some file systems cannot do it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write `content` to `path` atomically, creating the folder; see `atomic_file`."""
    with atomic_file(path, len(content), previous) as file:
        file.write(content)


def remove_leftovers(folder: Path, pattern: str = "*", min_age: float = 0.0) -> None:
    """Delete the temporary files that killed processes left in `folder` where `pattern` (a glob) leads.

    The caller holds the lock of the folder. Where there is none, `min_age` (seconds since the last write) protects the files
    of processes on other machines; those of living processes on this machine always stay.
    """
    for path in folder.glob(pattern):
        name = _TEMPORARY.fullmatch(path.name)
        if name and not _is_alive(int(name[1])):
            with contextlib.suppress(OSError):  # another process may have removed it, or it may be another user's
                if time.time() - path.stat().st_mtime >= min_age:
                    path.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it exists and belongs to another user
        return True
    return True
