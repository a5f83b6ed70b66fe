"""The cache of vision features on disk: what is kept, what is removed when it is too large, and what other runs notice."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from fedmllm.errors import ConfigError
from fedmllm.models.features import cache_folder, cache_limit, open_features, shrink, write_features

RECORD = torch.arange(250, dtype=torch.float32).reshape(1, 25, 10)
"""1000 bytes."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDMLLM_CACHE", str(tmp_path))
    monkeypatch.delenv("FEDMLLM_CACHE_GB", raising=False)
    return cache_folder() / "features"


def write(path: Path, records: int, used: float) -> None:
    """Features that were last used so many seconds after 1970."""
    write_features(path, [RECORD] * records)
    os.utime(path.with_suffix(".json"), (used, used))


def kept(folder: Path) -> set[str]:
    assert {p.stem for p in folder.glob("*.bin")} == {p.stem for p in folder.glob("*.json")}
    return {path.stem for path in folder.glob("*.bin")}


def test_the_features_that_were_used_longest_ago_go_first(folder: Path) -> None:
    for used, name in enumerate("abcd", start=1):
        write(folder / f"{name}.bin", records=2, used=used)
    assert open_features(folder / "a.bin") is not None  # which uses it, and closes it at once
    shrink(folder, limit=8000)
    assert kept(folder) == set("abcd")
    shrink(folder, limit=7999)
    assert kept(folder) == set("acd")
    shrink(folder, limit=4000)
    assert kept(folder) == set("ad")


def test_writing_shrinks_the_cache_to_its_limit_and_keeps_what_was_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "old.bin", records=2, used=1)
    monkeypatch.setenv("FEDMLLM_CACHE_GB", "1e-9")  # one byte
    written = write_features(folder / "new.bin", [RECORD])
    assert kept(folder) == {"new"}
    assert torch.equal(written.record(0), RECORD)


def test_features_that_are_open_stay_until_they_are_closed(folder: Path) -> None:
    write(folder / "a.bin", records=1, used=1)
    opened = open_features(folder / "a.bin")
    assert opened is not None
    os.utime(folder / "a.json", (1, 1))
    shrink(folder, limit=0)  # as another run does; locks on two descriptors exclude each other in one process too
    assert kept(folder) == {"a"}
    assert torch.equal(opened.record(0), RECORD)
    del opened
    shrink(folder, limit=0)
    assert kept(folder) == set()
    assert open_features(folder / "a.bin") is None


def test_a_full_disk_is_named_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot be written to .*a\.bin .*disk or the quota is full"):
        write_features(folder / "a.bin", [RECORD])
    assert list(folder.iterdir()) == []


def test_features_without_an_index_go_when_nobody_can_be_writing_them(folder: Path) -> None:
    write(folder / "a.bin", records=1, used=1)
    write(folder / "b.bin", records=1, used=1)
    for name in "ab":
        (folder / f"{name}.json").unlink()
    os.utime(folder / "a.bin", (1, 1))
    shrink(folder, limit=0)
    assert [path.name for path in folder.glob("*.bin")] == ["b.bin"]


def test_what_cannot_be_removed_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "a.bin", records=1, used=1)
    write(folder / "b.bin", records=1, used=2)
    unlink = Path.unlink

    def refuse_a(path: Path, missing_ok: bool = False) -> None:
        if path.name == "a.json":
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse_a)
    shrink(folder, limit=1000)
    assert kept(folder) == {"a"}


def test_a_damaged_index_is_as_none(folder: Path) -> None:
    write(folder / "a.bin", records=1, used=1)
    for content in ("", "{}", "[1]", '{"shapes": [[1, 25, 11]]}', '{"shapes": "x"}'):
        (folder / "a.json").write_text(content)
        assert open_features(folder / "a.bin") is None, content


@pytest.mark.parametrize("limit", ["plenty", "0", "-1", "nan"])
def test_a_limit_that_is_no_size_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv("FEDMLLM_CACHE_GB", limit)
    with pytest.raises(ConfigError, match=f"FEDMLLM_CACHE_GB = '{limit}' must be a number above 0"):
        write_features(folder / "a.bin", [RECORD])


def test_the_limit_is_twenty_gigabytes_unless_it_is_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_limit() == 20e9
    monkeypatch.setenv("FEDMLLM_CACHE_GB", "0.5")
    assert cache_limit() == 5e8
    monkeypatch.setenv("FEDMLLM_CACHE_GB", "inf")
    assert cache_limit() == float("inf")
