"""Locks between processes, as locked files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(lock: Path, refusal: Exception, seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock of a file, which goes with the process. Raises `refusal` where another has it for so many seconds."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= end:
                    raise refusal from None
                time.sleep(0.5)
        yield


class Lock:
    """A file that at most one process has locked; the file is there while one does, or was killed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def take(self) -> bool:
        """Whether it is ours now. Makes the folder."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = self._path.open("w")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                return False
            except OSError:  # a file system that knows no locks
                return True
            # Who held it before may have removed the file since we opened it; then ours protects nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                    return True
            self._file.close()

    def release(self) -> None:
        self._path.unlink(missing_ok=True)  # before it is unlocked, so that it is nobody else's
        self._file.close()
