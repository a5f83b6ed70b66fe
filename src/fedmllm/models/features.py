"""The frozen vision tower's outputs: computed once, kept in one memory-mapped file, handed back to the model.

A picture's record is an array (parts, tokens, width): the projected image tokens, followed by the DeepStack features of
families that have them; (parts, tiles, tokens, width) where the family pools into one tensor with a row a tile. The file's
name is a digest of the tower's weights, the processor and the pictures, so a second experiment on the same data and model
finds it; it holds nothing that depends on the adapter.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fedmllm.storage.atomic import write_atomically

LAYOUT = "2"
"""Changes when records are laid out otherwise, so that older files are not taken for these."""


def cache_folder() -> Path:
    """`$FEDMLLM_CACHE`, else `fedmllm` in the user's cache folder."""
    if folder := os.environ.get("FEDMLLM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmllm"


def digest_of(parts: Iterable[str | bytes]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "big") + data)
    return sha.hexdigest()


def split_output(output: BaseModelOutputWithPooling, pictures: int) -> list[Tensor]:
    """One record a picture from what `get_image_features` gives for equally shaped pictures."""
    pooled: Any = output.pooler_output
    if isinstance(pooled, Tensor):  # (pictures × tiles, tokens, width)
        pooled = pooled.reshape(pictures, -1, *pooled.shape[1:])
    elif len(pooled) > pictures:  # a list with an entry a slice, as many slices for each picture
        slices = len(pooled) // pictures
        pooled = [torch.cat(list(pooled[i * slices : (i + 1) * slices])) for i in range(pictures)]
    deep = getattr(output, "deepstack_features", None) or []
    return [torch.stack([pooled[i], *(layer[i] for layer in deep)]) for i in range(pictures)]


def join_output(records: Sequence[Tensor], as_tensor: bool) -> BaseModelOutputWithPooling:
    """The inverse of `split_output`, for the pictures of one batch in the order of their places in it.

    Some families join a list of pictures, others want one tensor and read it in order: `as_tensor` says which.
    """
    pooled: Any = [record[0] for record in records]
    output = BaseModelOutputWithPooling(pooler_output=torch.cat(pooled) if as_tensor else pooled)
    layers = records[0].shape[0] - 1
    if layers:
        output.deepstack_features = [[r[1 + k] for r in records] for k in range(layers)]
    return output


@dataclass(frozen=True)
class FeatureFile:
    """All records of one set of pictures, in one read-only memory map of float32."""

    data: NDArray[np.float32]
    shapes: list[tuple[int, ...]]
    starts: list[int]

    def record(self, index: int) -> Tensor:
        """A copy of picture `index`'s record."""
        shape, start = self.shapes[index], self.starts[index]
        return torch.from_numpy(np.array(self.data[start : start + int(np.prod(shape))]).reshape(shape))


def open_features(path: Path) -> FeatureFile | None:
    """The file if it is there and whole; None where it must be made (again)."""
    index = path.with_suffix(".json")
    try:  # the index is written last: without it there is nothing
        shapes = [tuple(shape) for shape in json.loads(index.read_text())["shapes"]]
    except (OSError, ValueError, KeyError):
        return None
    sizes = [int(np.prod(shape)) for shape in shapes]
    if not path.is_file() or path.stat().st_size != 4 * sum(sizes):
        return None
    starts = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(int).tolist() if sizes else []
    return FeatureFile(np.memmap(path, dtype=np.float32, mode="r"), shapes, starts)


def write_features(path: Path, records: Iterable[Tensor]) -> FeatureFile:
    """Stream the records to disk and open them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shapes = []
    with temporary.open("wb") as file:
        for record in records:
            array = record.detach().to("cpu", torch.float32).contiguous().numpy()
            shapes.append(list(array.shape))
            file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    write_atomically(path.with_suffix(".json"), json.dumps({"shapes": shapes}).encode())
    opened = open_features(path)
    assert opened is not None
    return opened
