"""The frozen vision tower's outputs: computed once, kept in one memory-mapped file, and passed to the model.

A picture's record is an array (parts, tokens, width): the projected image tokens, followed by the DeepStack features of
families that have them. It is (parts, tiles, tokens, width) if the family pools into one tensor with one row per tile. The
file name is a digest of the tower's weights, the processor and the pictures, so another experiment with the same data and
model finds the file. Nothing in it depends on the adapter.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fedmllm.errors import ConfigError, brief
from fedmllm.storage.atomic import atomic_file, remove_leftovers

_DAY = 24 * 3600.0
LAYOUT = "3"
"""Changed together with the layout of records and with how pictures are decoded, so that older files are not used."""


def cache_folder() -> Path:
    """`$FEDMLLM_CACHE`, or else `fedmllm` in the user's cache folder."""
    if folder := os.environ.get("FEDMLLM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmllm"


def cache_limit() -> float:
    """The bytes that the features of all experiments may take: `$FEDMLLM_CACHE_GB` gigabytes, by default 20, or inf for no
    limit. Raises ConfigError if that is no positive number."""
    text = os.environ.get("FEDMLLM_CACHE_GB") or "20"
    try:
        if (gigabytes := float(text)) > 0:
            return 1e9 * gigabytes
    except ValueError:
        pass
    raise ConfigError(
        f"the environment variable FEDMLLM_CACHE_GB = {brief(text, 40)!r} must be a number above 0: how many gigabytes the "
        "cache of vision features may take, such as 50, or inf for no limit."
    )


def check_cache() -> None:
    """Raises ConfigError if nothing can be written to the cache, or if its limit is no number."""
    cache_limit()
    folder = cache_folder() / "features"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"the cache of vision features cannot be written to {path} ({error.strerror or error}); set the environment variable "
        "FEDMLLM_CACHE to a folder with space in which you may write, or set model.cache_features = false."
    )


def digest_of(parts: Iterable[str | bytes]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "big") + data)
    return sha.hexdigest()


def split_output(output: BaseModelOutputWithPooling, pictures: int) -> list[Tensor]:
    """One record per picture from the output of `get_image_features` for pictures of equal shape."""
    pooled: Any = output.pooler_output
    if isinstance(pooled, Tensor):  # (pictures × tiles, tokens, width)
        pooled = pooled.reshape(pictures, -1, *pooled.shape[1:])
    elif len(pooled) > pictures:  # a list with one entry per slice and equally many slices per picture
        slices = len(pooled) // pictures
        pooled = [torch.cat(list(pooled[i * slices : (i + 1) * slices])) for i in range(pictures)]
    deep = getattr(output, "deepstack_features", None) or []
    return [torch.stack([pooled[i], *(layer[i] for layer in deep)]) for i in range(pictures)]


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):  # type: ignore[misc]
    """The output of any family's `get_image_features`. Every entry is a declared field, because hooks of accelerate, which move
    a model's inputs to its device, copy nothing else."""

    deepstack_features: list[list[Tensor]] | None = None


def join_output(records: Sequence[Tensor], as_tensor: bool) -> ImageFeatures:
    """The inverse of `split_output`, for the pictures of one batch in the order of its rows.

    Some families expect a list with one entry per picture, others (`as_tensor`) one tensor that they read in order.
    """
    pooled: Any = [record[0] for record in records]
    output = ImageFeatures(pooler_output=torch.cat(pooled) if as_tensor else pooled)
    if len(records[0]) > 1:
        output.deepstack_features = [[record[k] for record in records] for k in range(1, len(records[0]))]
    return output


@dataclass(frozen=True)
class FeatureFile:
    """The records of a set of pictures, in one read-only memory map of float32."""

    data: NDArray[np.float32]
    shapes: list[tuple[int, ...]]
    starts: list[int]

    def record(self, index: int) -> Tensor:
        """A copy of the record of picture `index`."""
        shape, start = self.shapes[index], self.starts[index]
        return torch.from_numpy(np.array(self.data[start : start + int(np.prod(shape))]).reshape(shape))


def open_features(path: Path) -> FeatureFile | None:
    """The file, or None if it is missing or incomplete. While it is open, no other run removes it."""
    index, opened = path.with_suffix(".json"), None
    try:
        file = index.open("rb")
    except OSError:
        return None
    try:  # the index is written last, so without it the file is incomplete
        _hold(file)
        shapes = [tuple(shape) for shape in json.loads(file.read())["shapes"]]
        sizes = [int(np.prod(shape)) for shape in shapes]
        if path.stat().st_size != 4 * sum(sizes):
            return None
        starts = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(int).tolist() if sizes else []
        data = np.memmap(path, dtype=np.float32, mode="r") if sum(sizes) else np.empty(0, np.float32)  # which cannot be mapped
        opened = FeatureFile(data, shapes, starts)
        weakref.finalize(opened, file.close)
        with suppress(OSError):  # someone else's folder, perhaps
            os.utime(index)
        return opened
    except (OSError, ValueError, KeyError, TypeError):
        return None
    finally:
        if opened is None:
            file.close()


def _hold(index: BinaryIO) -> None:
    """Keep the features of an index from being removed until it is closed."""
    with suppress(OSError):  # some file systems have no locks
        fcntl.flock(index, fcntl.LOCK_SH)


def write_features(path: Path, records: Iterable[Tensor]) -> FeatureFile:
    """Write the records to disk one by one, open the file, and remove others if the cache is too large.

    Raises ConfigError if it cannot be written.
    """
    check_cache()
    remove_leftovers(path.parent, min_age=_DAY)  # no lock: a machine that shares the cache may be writing
    shapes: list[tuple[int, ...]] = []
    try:
        with atomic_file(path) as file:
            for record in records:
                array = record.detach().to("cpu", torch.float32).contiguous().numpy()
                shapes.append(array.shape)
                file.write(array.tobytes())
        with ExitStack() as held:
            with atomic_file(path.with_suffix(".json")) as file:
                file.write(json.dumps({"shapes": shapes}).encode())
                _hold(held.enter_context(os.fdopen(os.dup(file.fileno()), "wb")))  # before another run can see and remove it
            opened = open_features(path)
    except OSError as error:
        raise _cannot_write(path, error) from None
    assert opened is not None
    shrink(path.parent, cache_limit())
    return opened


def shrink(folder: Path, limit: float) -> None:
    """Remove the features that were used longest ago until all take at most `limit` bytes. Those that a run has open stay, and
    what this user may not remove."""
    entries: list[tuple[float, int, Path]] = []
    for path in folder.glob("*.bin"):
        with suppress(OSError):  # another run may have removed it
            index = path.with_suffix(".json")
            entries.append(((index if index.exists() else path).stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in entries)
    for used, size, path in sorted(entries):
        if total <= limit:
            return
        with suppress(OSError):
            _remove(path, used)
            total -= size


def _remove(path: Path, used: float) -> None:
    """Raises OSError for features that are in use or cannot be removed."""
    index = path.with_suffix(".json")
    if not index.exists():
        if time.time() - used < _DAY:
            raise OSError("another run may be writing it")
        path.unlink()
        return
    with index.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        index.unlink()
        path.unlink(missing_ok=True)
