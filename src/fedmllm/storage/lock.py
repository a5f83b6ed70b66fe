"""Locks between processes, held on files with `flock`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_POLL_SECONDS = 0.5


class FileLock:
    """A lock that at most one process holds. Its file exists while the lock is held, or after its holder was killed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def acquire(self, wait_seconds: float = 0.0) -> bool:
        """Try to take the lock for up to `wait_seconds`; return whether this process holds it. Creates the folder.

        The operating system releases the lock when the process ends. A file system without locks always grants it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait_seconds
        while not self._try_acquire():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _try_acquire(self) -> bool:
        while True:
            self._file = self._path.open("a")  # empties nothing, should the folder be from elsewhere and the file a link
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                return False
            except OSError:  # the file system does not support locks
                return True
            # The previous holder may have removed the file after it was opened here; a lock on a removed file protects nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                    return True
            self._file.close()

    def release(self) -> None:
        """Remove the file and release the lock."""
        self._path.unlink(missing_ok=True)  # before unlocking, because afterwards the file may belong to another process
        self._file.close()


@contextlib.contextmanager
def locked(path: Path, refusal: Exception, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock on `path`. Raises `refusal` if another process still holds it after `wait_seconds`."""
    lock = FileLock(path)
    if not lock.acquire(wait_seconds):
        raise refusal
    try:
        yield
    finally:
        lock.release()
