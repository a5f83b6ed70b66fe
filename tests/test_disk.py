"""Files written to a disk that is full, and what processes leave behind that are killed while they write."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmllm.storage import atomic
from fedmllm.storage.atomic import DiskFull, remove_leftovers, write_atomically
from fedmllm.storage.run_dir import RunDir
from made_checkpoints import made_run, record_of, state_after


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    run, dead = made_run(tmp_path / "run"), dead_process()
    left = [
        run.path / f".result.json.{dead}.tmp", run.checkpoint / f".server.safetensors.{dead}.tmp",
        run.checkpoint / "clients" / "client-0" / f".round-1.safetensors.{dead}.tmp",
    ]  # fmt: skip
    kept = [
        run.path / f".result.json.{os.getpid()}.tmp", run.path / f"result.json.{dead}.tmp", run.path / ".notes.tmp",
        run.path / f".result.json.{dead}x.tmp", tmp_path / f".other.{dead}.tmp",
    ]  # fmt: skip
    for path in left + kept:
        path.write_bytes(b"part")
    lost = run.path / ".gone.1.tmp"
    lost.symlink_to(tmp_path / "nowhere")
    with RunDir(run.path).claimed():
        assert [path for path in left if path.exists()] == []
    assert all(path.exists() for path in kept)


def test_recent_files_stay_where_no_lock_protects_them(tmp_path: Path) -> None:
    old, new = (tmp_path / f".{name}.{dead_process()}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (1000, 1000))
    remove_leftovers(tmp_path, min_age=3600)
    assert [path.name for path in tmp_path.iterdir()] == [new.name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    run = made_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFull) as error:
            write_atomically(run.path / "result.json", b"x" * 12345)
        for part in (str(run.path / "result.json"), "12,345 bytes are needed", "free some space", "--resume"):
            assert part in str(error.value)
        run.save_round(record_of(4), state_after(5), "d")
        with pytest.raises(DiskFull, match=r"rounds\.jsonl cannot be written, .* bytes are needed"):
            run.rounds()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    run.save_round(record_of(4), state_after(5), "d")
    assert run.rounds()[-1] == record_of(4)


def test_another_error_of_the_disk_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error") as error:
        write_atomically(tmp_path / "file", b"x")
    assert not isinstance(error.value, DiskFull)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_flushed_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[bool, bool]] = []

    def fsync(descriptor: int) -> None:
        flushed.append((os.path.samestat(os.fstat(descriptor), tmp_path.stat()), (tmp_path / "file").exists()))

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    write_atomically(tmp_path / "file", b"x")
    assert flushed == [(False, False), (True, True)]
