"""A sweep as one small file: a `.tar.xz` with everything that `report`, `compare` and a later `sweep` read.

Files of the same kind are stored next to each other, and the compressor's dictionary spans all of them: the runs of a grid
answer the same questions, mostly with the same answers.
"""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedmllm.errors import RunError
from fedmllm.storage.atomic import atomic_file
from fedmllm.storage.run_dir import RunDir

INDEX = "sweep.json"
SUFFIX = ".tar.xz"
KEPT = ("result.json", "meta.json", "config.toml", "rounds.jsonl", "predictions.jsonl")
"""The files of a run that are packed, in the order of the archive."""
MAX_MEMBERS, MAX_BYTES = 100_000, 2**30
"""What an archive may hold when it is unpacked: the largest grids so far have 4,000 members and 300 MB."""
_MAX_HEADER = 2**20  # bytes that are no member's content: a header, the padding before it, the end of the archive


def pack(folder: Path, file: Path) -> tuple[int, int]:
    """Write the index and the complete runs of a sweep to `file`; return (runs packed, bytes written).

    The same folder always gives the same bytes. Raises RunError if the folder does not hold a sweep or has no complete run,
    or if the file name does not end in .tar.xz.
    """
    if not file.name.endswith(SUFFIX) or file.is_dir():
        raise RunError(f"{file}: give a file name that ends in {SUFFIX}.")
    index, content = _read_index(folder)
    name = index["name"]
    ids = [run_id for run_id in sorted({row["id"] for row in index["cells"]}) if RunDir(folder / run_id).complete]
    if not ids:
        raise RunError(f"{folder} has no complete run; run the sweep first.")
    paths = [f"{run_id}.toml" for run_id in ids] + [f"{run_id}/{kept}" for kept in KEPT for run_id in ids]
    paths = [path for path in paths if (folder / path).is_file()]
    for path in paths:  # a folder from elsewhere must not make its user publish a file of their own
        if not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{folder / path} is a link that leads out of {folder}; put the file itself there.")
    size = len(content) + sum((folder / path).stat().st_size + 2 * tarfile.BLOCKSIZE for path in paths)
    with (
        atomic_file(file) as raw,
        lzma.open(raw, "wb", filters=[_compressor(size)]) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        _add(tar, f"{name}/{INDEX}", content)
        for path in paths:
            _add(tar, f"{name}/{path}", (folder / path).read_bytes())
    return len(ids), file.stat().st_size


def _compressor(size: int) -> dict[str, int]:
    # Packing needs eleven times the dictionary in memory, and unpacking needs it once: it is no larger than the data.
    dictionary = min(max(size, 2**16), 2**26)
    # Predictions repeat in long runs, so the search prefers the longest matches and tries few of them. The standard presets
    # take ten times as long for a file a quarter smaller (9 extreme), or write twice as much (6).
    search = {"mode": lzma.MODE_NORMAL, "mf": lzma.MF_HC4, "nice_len": 273, "depth": 32}
    return {"id": lzma.FILTER_LZMA2, "dict_size": dictionary, **search}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # A new TarInfo has time 0, owner 0 without a name, and mode 0644, so nothing in it depends on the machine.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a sweep's folder, with a shape that `check_index` accepts. Raises RunError."""
    return _read_index(folder)[0]


def _read_index(folder: Path) -> tuple[dict[str, Any], bytes]:
    """(the index, the content of its file)."""
    from fedmllm.storage.shapes import check_index  # the help page must not wait for pydantic

    path = folder / INDEX
    if not path.is_file():
        raise RunError(f"{folder} is not a sweep's folder; give the output folder of `fedmllm sweep`.")
    try:
        content = path.read_bytes()
        index: dict[str, Any] = json.loads(content)
        check_index(index)
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as the index of a sweep ({error}); run the sweep again.") from None
    return index, content


@contextlib.contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield the given folders, with each `.tar.xz` replaced by a temporary folder that it is unpacked into.

    Raises RunError for a file that cannot be read or is not a sweep's archive. A RunError raised inside the block names the
    archive instead of the temporary folder.
    """
    archive_of: dict[str, str] = {}  # temporary folder -> archive
    with contextlib.ExitStack() as stack:
        try:
            folders = []
            for path in paths:
                folder = path
                if path.name.endswith(SUFFIX) and not path.is_dir():
                    scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedmllm-"))
                    archive_of[scratch] = str(path)
                    folder = _unpack(path, Path(scratch))
                    archive_of = {str(folder): str(path)} | archive_of  # the longer path is replaced first
                    _read_index(folder)
                folders.append(folder)
            yield folders
        except RunError as error:
            message = str(error)
            for temporary, archive in archive_of.items():
                message = message.replace(temporary, archive)
            raise RunError(message) from None


class _Metered:
    """An unpacked stream that can be read no further than its members account for, so that neither a huge header nor what
    follows the last member is ever unpacked. Raises RunError, as soon as a limit is passed."""

    def __init__(self, stream: lzma.LZMAFile, file: Path) -> None:
        self._stream, self._file = stream, file
        self._members = self._bytes = 0
        self._left = _MAX_HEADER

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise RunError(
                f"{self._file} is not a sweep's archive: more than {_MAX_HEADER:,} bytes belong to none of its files."
            )
        return content

    def admit(self, member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        """tarfile's data filter, which also refuses what `pack` never writes: links, devices, and folders inside a run's."""
        self._members += 1
        self._bytes += member.size
        if self._members > MAX_MEMBERS or self._bytes > MAX_BYTES:
            raise RunError(
                f"{self._file} unpacks to more than {MAX_MEMBERS:,} members or {MAX_BYTES:,} bytes, the most that is accepted; "
                "if you trust it, unpack it with tar and give the folder."
            )
        self._left = member.size + _MAX_HEADER
        if not (member.isfile() or member.isdir()):
            raise tarfile.SpecialFileError(member)
        checked = tarfile.data_filter(member, folder)
        if len(Path(member.name).parts) > 3:
            raise RunError(f"{self._file} is not a sweep's archive: {member.name[:100]!r} lies deeper than the files of a run.")
        return checked


def _unpack(file: Path, scratch: Path) -> Path:
    """Unpack the archive into `scratch`; return its one folder."""
    try:
        with lzma.open(file) as unpacked:
            stream = _Metered(unpacked, file)
            with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
                tar.extractall(scratch, filter=stream.admit)
            while stream.read(2**20):  # tar stops at its own end, before the checksum of the whole file
                pass
    except tarfile.FilterError as error:
        name = error.tarinfo.name[:100]
        raise RunError(f"{file} is not a sweep's archive: {name!r} is a link or leads out of its folder.") from None
    except (OSError, EOFError, ValueError, lzma.LZMAError, tarfile.TarError) as error:
        raise RunError(f"{file} cannot be read ({error}); get it again, or pack the sweep again.") from None
    contents = list(scratch.iterdir())
    if len(contents) != 1 or not (contents[0] / INDEX).is_file():
        raise RunError(f"{file} is not a sweep's archive: give a file made by `fedmllm pack`, one folder with {INDEX} in it.")
    return contents[0]
