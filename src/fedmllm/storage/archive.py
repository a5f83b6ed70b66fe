"""A sweep's folder as one small file: what `report`, `compare` and a later `sweep` read, in a `.tar.xz` that any `tar` unpacks.

Like files are neighbours in it, and the compressor looks back over all of them: the runs of a grid answer the same questions,
mostly alike.
"""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedmllm.errors import RunError
from fedmllm.storage.run_dir import RunDir

INDEX = "sweep.json"
SUFFIX = ".tar.xz"
KEPT = ("result.json", "meta.json", "config.toml", "rounds.jsonl", "predictions.jsonl")
"""What is kept of a run's directory, in the order of the archive."""


def pack(folder: Path, file: Path) -> tuple[int, int]:
    """Write the index of a sweep and its complete runs to `file`; (runs packed, bytes written).

    The same folder gives the same bytes. Raises RunError where the folder is no sweep's or has no complete run, or the file's
    name does not end in .tar.xz.
    """
    if not file.name.endswith(SUFFIX) or file.is_dir():
        raise RunError(f"{file}: give a file's name that ends in {SUFFIX}.")
    index, name, named = _read_index(folder)
    ids = [one for one in named if RunDir(folder / one).complete]
    if not ids:
        raise RunError(f"{folder} has no complete run; run the sweep first.")
    paths = [f"{one}.toml" for one in ids] + [f"{one}/{kept}" for kept in KEPT for one in ids]
    paths = [path for path in paths if (folder / path).is_file()]
    whole = len(index) + sum((folder / path).stat().st_size + 2 * tarfile.BLOCKSIZE for path in paths)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as raw:
            with (
                lzma.open(raw, "wb", filters=[_compressor(whole)]) as stream,
                tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
            ):
                _add(tar, f"{name}/{INDEX}", index)
                for path in paths:
                    _add(tar, f"{name}/{path}", (folder / path).read_bytes())
            raw.flush()
            os.fsync(raw.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return len(ids), file.stat().st_size


def _compressor(size: int) -> dict[str, int]:
    # Packing takes eleven times the dictionary in memory and unpacking once: no larger than there is to look back on.
    dictionary = min(max(size, 2**16), 2**26)
    # Answers repeat at great length: matches as long as there can be, few of them tried. The presets' own search takes ten
    # times as long for a quarter less (9 extreme), or writes twice as much (6).
    search = {"mode": lzma.MODE_NORMAL, "mf": lzma.MF_HC4, "nice_len": 273, "depth": 32}
    return {"id": lzma.FILTER_LZMA2, "dict_size": dictionary, **search}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # A fresh TarInfo has time 0, owner 0 without a name and mode 0644: nothing of this machine.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _read_index(folder: Path) -> tuple[bytes, str, list[str]]:
    """(the file's content, the sweep's name, the ids of its runs in order). Raises RunError where the folder is no sweep's, or
    a name in the index would lead elsewhere."""
    path = folder / INDEX
    if not path.is_file():
        raise RunError(f"{folder} is no sweep's folder; give what `fedmllm sweep` made.")
    try:
        content = path.read_bytes()
        index = json.loads(content)
        name, ids = index["name"], sorted({row["id"] for row in index["cells"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__}: {error}); run the sweep again.") from None
    for one in (name, *ids):
        if not isinstance(one, str) or one in ("", ".", "..") or set(one) & set("/\\\0"):
            raise RunError(f"{path}: {one!r} cannot be the name of a folder; give the sweep a plain name and run it again.")
    return content, name, ids


@contextlib.contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Folders as they are; in place of a `.tar.xz` a folder that it is unpacked into, which goes at the end.

    Raises RunError for a file that cannot be read or is no sweep's archive. A RunError from within names the archive, not the
    folder that stands for it.
    """
    names: dict[str, str] = {}
    with contextlib.ExitStack() as scratches:
        try:
            folders = []
            for path in paths:
                if path.name.endswith(SUFFIX) and not path.is_dir():
                    scratch = scratches.enter_context(tempfile.TemporaryDirectory(prefix="fedmllm-"))
                    names[scratch] = str(path)
                    folder = _unpack(path, Path(scratch))
                    names = {str(folder): str(path)} | names  # the longer name is replaced first
                    _read_index(folder)
                    folders.append(folder)
                else:
                    folders.append(path)
            yield folders
        except RunError as error:
            said = str(error)
            for there, here in names.items():
                said = said.replace(there, here)
            raise RunError(said) from None


def _unpack(file: Path, scratch: Path) -> Path:
    """The one folder that the archive has in it."""
    try:
        with lzma.open(file) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                tar.extractall(scratch, filter=_plain)
            while stream.read(2**20):  # tar stops at its own end; the checksum of the whole comes after it
                pass
    except tarfile.FilterError as error:
        odd = error.tarinfo.name
        raise RunError(f"{file} is no sweep's archive: {odd!r} is a link or leads out of its folder.") from None
    except (OSError, EOFError, ValueError, lzma.LZMAError, tarfile.TarError) as error:
        raise RunError(f"{file} cannot be read ({error}); get it again, or pack the sweep again.") from None
    found = list(scratch.iterdir())
    if len(found) != 1 or not (found[0] / INDEX).is_file():
        raise RunError(f"{file} is no sweep's archive: give what `fedmllm pack` made, one folder with {INDEX} in it.")
    return found[0]


def _plain(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """tarfile's own filter, and no links: `pack` writes none."""
    if not (member.isfile() or member.isdir()):
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, folder)
