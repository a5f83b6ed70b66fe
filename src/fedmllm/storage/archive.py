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

from fedmllm.errors import RunError
from fedmllm.storage.atomic import atomic_file
from fedmllm.storage.run_dir import RunDir

INDEX = "sweep.json"
SUFFIX = ".tar.xz"
KEPT = ("result.json", "meta.json", "config.toml", "rounds.jsonl", "predictions.jsonl")
"""The files of a run that are packed, in the order of the archive."""


def pack(folder: Path, file: Path) -> tuple[int, int]:
    """Write the index and the complete runs of a sweep to `file`; return (runs packed, bytes written).

    The same folder always gives the same bytes. Raises RunError if the folder does not hold a sweep or has no complete run,
    or if the file name does not end in .tar.xz.
    """
    if not file.name.endswith(SUFFIX) or file.is_dir():
        raise RunError(f"{file}: give a file name that ends in {SUFFIX}.")
    index, name, all_ids = _read_index(folder)
    ids = [run_id for run_id in all_ids if RunDir(folder / run_id).complete]
    if not ids:
        raise RunError(f"{folder} has no complete run; run the sweep first.")
    paths = [f"{run_id}.toml" for run_id in ids] + [f"{run_id}/{kept}" for kept in KEPT for run_id in ids]
    paths = [path for path in paths if (folder / path).is_file()]
    size = len(index) + sum((folder / path).stat().st_size + 2 * tarfile.BLOCKSIZE for path in paths)
    with (
        atomic_file(file) as raw,
        lzma.open(raw, "wb", filters=[_compressor(size)]) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        _add(tar, f"{name}/{INDEX}", index)
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


def _read_index(folder: Path) -> tuple[bytes, str, list[str]]:
    """(content of the index, name of the sweep, sorted ids of its runs). Raises RunError if the folder does not hold a sweep
    or a name in the index is not a plain file name."""
    path = folder / INDEX
    if not path.is_file():
        raise RunError(f"{folder} is not a sweep's folder; give the output folder of `fedmllm sweep`.")
    try:
        content = path.read_bytes()
        index = json.loads(content)
        sweep_name, ids = index["name"], sorted({row["id"] for row in index["cells"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__}: {error}); run the sweep again.") from None
    for name in (sweep_name, *ids):
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise RunError(f"{path}: {name!r} cannot be the name of a folder; give the sweep a plain name and run it again.")
    return content, sweep_name, ids


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


def _unpack(file: Path, scratch: Path) -> Path:
    """Unpack the archive into `scratch`; return its one folder."""
    try:
        with lzma.open(file) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                tar.extractall(scratch, filter=_plain)
            while stream.read(2**20):  # tar stops at its own end, before the checksum of the whole file
                pass
    except tarfile.FilterError as error:
        name = error.tarinfo.name
        raise RunError(f"{file} is not a sweep's archive: {name!r} is a link or leads out of its folder.") from None
    except (OSError, EOFError, ValueError, lzma.LZMAError, tarfile.TarError) as error:
        raise RunError(f"{file} cannot be read ({error}); get it again, or pack the sweep again.") from None
    contents = list(scratch.iterdir())
    if len(contents) != 1 or not (contents[0] / INDEX).is_file():
        raise RunError(f"{file} is not a sweep's archive: give a file made by `fedmllm pack`, one folder with {INDEX} in it.")
    return contents[0]


def _plain(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """tarfile's data filter, which also refuses links: `pack` never writes any."""
    if not (member.isfile() or member.isdir()):
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, folder)
