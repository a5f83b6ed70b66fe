"""Locks between processes. `flock` also separates two open files of one process, so one process is enough to test them."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from fedmllm.storage.lock import FileLock, locked


def test_only_one_holder_and_no_file_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    first, second = FileLock(path), FileLock(path)
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert not path.exists()
    assert second.acquire()
    second.release()


def test_a_held_lock_raises_the_given_error(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, RuntimeError("first")):
        with pytest.raises(RuntimeError, match="second"), locked(path, RuntimeError("second")):
            pass
        assert path.exists(), "a refused holder does not remove the file"
    with pytest.raises(OSError, match="full"), locked(path, RuntimeError()):
        raise OSError("full")
    assert not path.exists()


def test_waiting_for_a_lock(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    timer = threading.Timer(0.2, lock.release)
    timer.start()
    with locked(tmp_path / "lock", RuntimeError(), wait_seconds=20):
        assert not FileLock(tmp_path / "lock").acquire()
    timer.join()


def test_a_file_left_by_a_kill_can_be_locked(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with locked(tmp_path / "lock", RuntimeError()):
        assert not FileLock(tmp_path / "lock").acquire()


def test_a_lock_on_a_removed_file_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flock = tmp_path / "lock", fcntl.flock
    calls: list[int] = []

    def removed_before_the_first(file: int, operation: int) -> None:
        if not calls:
            path.unlink()  # as by a holder that releases between `open` and `flock`
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before_the_first)
    lock = FileLock(path)
    assert lock.acquire()
    assert len(calls) == 2
    assert path.exists()
    assert not FileLock(path).acquire()
    lock.release()


def test_a_file_system_without_locks_grants_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path / "lock", RuntimeError()):
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
