"""Atomic writes: a reader sees the old file or the new one, never a part of either."""

from __future__ import annotations

import contextlib
import os
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
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing. On success it is flushed to disk and renamed to `path`; if the block
    raises, it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically, creating the folder."""
    with atomic_file(path) as file:
        file.write(content)
