"""Samples in a temporary file, so that a data set takes memory for its numbers and ids, and not for its texts."""

from __future__ import annotations

import marshal
import os
import tempfile
import weakref
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from fedmllm.data.images import Images
from fedmllm.data.samples import VISIBLE, Sample
from fedmllm.data.scenarios import Modalities
from fedmllm.errors import DataError

_BUFFER = 1 << 20
"""Bytes of text that stay in memory; data sets with more are in a file."""
_CHUNK = 1 << 12
"""Samples whose columns are converted to Python objects at a time when all are iterated over."""

N = TypeVar("N", bound=np.integer[Any])


class _Texts:
    """Bytes that are appended and then read in pieces, in an unnamed temporary file if they are many.

    The file is read, not mapped, because pages of a map that were touched once count as the process's memory.
    """

    def __init__(self) -> None:
        self._memory, self._file = bytearray(), -1
        self.size = 0

    def append(self, piece: bytes) -> None:
        self._memory += piece
        self.size += len(piece)
        if len(self._memory) >= _BUFFER:
            self.flush()

    def flush(self) -> None:
        """Write out what is in memory, if there has been too much of it. Raises DataError."""
        if self._file < 0 and self.size < _BUFFER:
            return
        try:
            if self._file < 0:
                with tempfile.TemporaryFile() as file:
                    self._file = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._file)
            while self._memory:
                del self._memory[: os.write(self._file, self._memory)]
        except OSError as error:
            raise DataError(
                f"the texts of the samples cannot be written to a temporary file ({error.strerror or error}); set the "
                "environment variable TMPDIR to a folder with space in which you may write."
            ) from None

    def read(self, start: int, size: int) -> bytes:
        return bytes(self._memory[start : start + size]) if self._file < 0 else os.pread(self._file, size, start)


class Samples(Sequence[Sample]):
    """Samples that are made when they are asked for, so that holding them takes some thirty bytes and the id of each.

    It behaves like a list that cannot be changed; parts of it, by a slice or `take`, share the texts.
    """

    def __init__(
        self,
        texts: _Texts,
        images: Sequence[Images],
        ids: pa.StringArray,
        columns: tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]],
    ) -> None:
        self._texts, self.images, self.ids, self._columns = texts, images, ids, columns
        self.starts, self._sizes, self.image, self.has_text = columns

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Samples:
        """These samples in their order. Raises DataError if there is no space for their texts."""
        if isinstance(samples, Samples):
            return samples
        texts, images, ids = _Texts(), dict[Images, int](), bytearray()
        starts, sizes, image, has_text, id_ends = array("q"), array("i"), array("i"), array("b"), array("i", [0])
        for s in samples:
            rest = (s.question, s.answer, s.text, s.choices, s.lettered, s.label, s.source, s.where, s.closed)
            record = marshal.dumps(rest)
            starts.append(texts.size)
            sizes.append(len(record))
            texts.append(record)
            image.append(-1 if s.image is None else images.setdefault(s.image, len(images)))
            has_text.append(s.text is not None)
            ids += s.id.encode()
            id_ends.append(len(ids))
        texts.flush()
        id_column = pa.StringArray.from_buffers(len(starts), pa.py_buffer(id_ends), pa.py_buffer(ids))
        numbers = (np.frombuffer(starts, np.int64), np.frombuffer(sizes, np.int32), np.frombuffer(image, np.int32))
        return cls(texts, list(images), id_column, (*numbers, np.frombuffer(has_text, np.bool_)))

    @property
    def has_image(self) -> NDArray[np.bool_]:
        return self.image >= 0

    def modalities(self) -> list[Modalities]:
        """The modalities of each sample."""
        return [VISIBLE[shown] for shown in zip(self.has_image.tolist(), self.has_text.tolist(), strict=True)]

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        index = range(len(self))[index]
        start, size, image, _ = (column[index].item() for column in self._columns)
        return self._sample(self.ids[index].as_py(), start, size, image)

    def __iter__(self) -> Iterator[Sample]:
        for first in range(0, len(self), _CHUNK):
            part = slice(first, first + _CHUNK)
            yield from map(self._sample, self.ids[part].to_pylist(), *(column[part].tolist() for column in self._columns[:3]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _sample(self, sample_id: str, start: int, size: int, number: int) -> Sample:
        question, answer, text, choices, *rest = marshal.loads(self._texts.read(start, size))
        image = self.images[number] if number >= 0 else None
        return Sample(sample_id, question, answer, image, text, None if choices is None else tuple(choices), *rest)

    def take(self, indices: ArrayLike) -> Samples:
        """The samples at these indices, in this order."""
        chosen = np.asarray(indices, np.int64)
        starts, sizes, image, has_text = self._columns
        columns = (starts[chosen], sizes[chosen], image[chosen], has_text[chosen])
        return Samples(self._texts, self.images, self.ids.take(arrow(chosen)), columns)

    def indices(self, part: Samples) -> NDArray[np.int64]:
        """The indices of the samples in `part`, which is a part of these, in the order in which they were given."""
        return np.searchsorted(self.starts, part.starts)

    @cached_property
    def _order(self) -> NDArray[np.int64] | None:
        """The indices in the order of ids, in which equal ids keep theirs; None if the samples are in it."""
        if pc.all(pc.less_equal(self.ids[:-1], self.ids[1:])).as_py():
            return None
        return _numbers(pc.array_sort_indices(self.ids), np.int64)

    def ordered(self) -> Samples:
        """The samples in the order of their ids; equal ids keep theirs."""
        return self if self._order is None else self.take(self._order)

    def repeated(self) -> NDArray[np.int64]:
        """The indices of the samples whose id an earlier one has."""
        ids = self.ordered().ids
        twice = _numbers(pc.indices_nonzero(pc.equal(ids[1:], ids[:-1])), np.int64) + 1
        return twice if self._order is None else self._order[twice]

    def places(self, ids: pa.StringArray) -> NDArray[np.int64]:
        """The index of the sample with each of these ids. Raises KeyError."""
        if len(ids) == len(self):  # all of them in another order, as a manifest has them: sorting takes less than a hash table
            order, own = _numbers(pc.array_sort_indices(ids), np.int64), self.ordered().ids
            parts = (slice(first, first + _CHUNK) for first in range(0, len(ids), _CHUNK))
            if all(ids.take(arrow(order[part])).equals(own[part]) for part in parts):
                places = np.empty(len(ids), np.int64)
                places[order] = np.arange(len(ids)) if self._order is None else self._order
                return places
        found = pc.index_in(ids, value_set=self.ids)
        if found.null_count:
            raise KeyError(ids.filter(found.is_null())[0].as_py())
        return _numbers(found, np.int32).astype(np.int64)

    @cached_property
    def _encoded_id(self) -> Callable[[int], bytes]:
        """The id of the sample at an index, in UTF-8, in which texts have the same order."""
        _, ends, letters = self.ids.buffers()
        first, data = self.ids.offset, memoryview(letters or b"")
        numbers = memoryview(ends or b"").cast("i")  # faster than an array, one by one
        return lambda index: bytes(data[numbers[first + index] : numbers[first + index + 1]])

    def find(self, sample_id: str) -> Sample:
        """The sample with this id, of samples in the order of their ids. Raises KeyError."""
        wanted, of = sample_id.encode(), self._encoded_id
        index = bisect_left(range(len(self)), wanted, key=of)
        if index == len(self) or of(index) != wanted:
            raise KeyError(sample_id)
        return self[index]


def pick(samples: Sequence[Sample], indices: Sequence[int]) -> Sequence[Sample]:
    """The samples at these indices, in this order."""
    return samples.take(indices) if isinstance(samples, Samples) else [samples[i] for i in indices]


# Arrow's own conversions, `array` and `to_numpy`, do what these two do, and import pandas, which takes forty megabytes, for it.


def arrow(indices: NDArray[np.int64]) -> pa.Int64Array:
    """Indices for Arrow."""
    return pa.Int64Array.from_buffers(pa.int64(), len(indices), [None, pa.py_buffer(np.ascontiguousarray(indices))])


def _numbers(column: pa.Array, dtype: type[N]) -> NDArray[N]:
    """An Arrow column of numbers as wide as this type, none of them null; indices, which it has unsigned, fit either way."""
    whole = np.frombuffer(column.buffers()[1], dtype) if len(column) else np.empty(0, dtype)
    return whole[column.offset : column.offset + len(column)]
