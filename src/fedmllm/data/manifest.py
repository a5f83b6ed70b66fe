"""The manifest: the result of partition and scenario as a table `sample_id, client, has_image, has_text` with a digest.

The same settings and seed give the same bytes on every machine, independent of the order in which files are listed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedmllm.data.samples import MODALITIES, VISIBLE, Sample
from fedmllm.data.scenarios import Modalities, Noise
from fedmllm.data.schedule import NOTHING_CHANGES, Schedule
from fedmllm.data.stored import Samples
from fedmllm.errors import DataError
from fedmllm.storage.atomic import write_atomically

SCHEMA = pa.schema([("sample_id", pa.string()), ("client", pa.int32()), ("has_image", pa.bool_()), ("has_text", pa.bool_())])
_NOISE = "noise"
"""A fifth column, of manifests with samples that are there but bad."""
_CHUNK = 1 << 14
"""Rows that are converted to Python objects at a time when all rows are iterated over."""
_DIGESTED = {flags: str(sorted(visible)) for flags, visible in VISIBLE.items()}
"""(has image, has text) -> the modalities as they enter the digest."""


@dataclass(frozen=True)
class Holding:
    """One row: client `client` holds the sample and sees its modalities `visible`."""

    sample_id: str
    client: int
    visible: Modalities
    noise: Noise = ()
    """How bad the visible modalities are."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """The rows as columns of equal length, sorted by client, so that a client's rows are a slice.

    Columns keep a row at ten bytes plus those of its id; iteration creates one `Holding` at a time.
    """

    ids: pa.StringArray
    owner: NDArray[np.int32]
    """The client of each row."""
    image: NDArray[np.bool_]
    """Whether the client sees the image, for each row."""
    text: NDArray[np.bool_]
    clients: int
    """The number of clients, some of which may hold nothing."""
    schedule: Schedule = NOTHING_CHANGES
    """What clients may see of it in each round, if that changes."""
    noise: Mapping[str, Noise] = field(default_factory=dict)
    """sample id -> how bad what its client sees of it is; samples of which all is good are not in it."""

    @classmethod
    def of(cls, holdings: Iterable[Holding], clients: int) -> Manifest:
        """Rows sorted by client; the rows of one client keep their order."""
        rows = sorted(holdings, key=lambda h: h.client)
        return cls(
            pa.array([h.sample_id for h in rows], pa.string()),
            np.array([h.client for h in rows], dtype=np.int32),
            np.array(["image" in h.visible for h in rows], dtype=np.bool_),
            np.array(["text" in h.visible for h in rows], dtype=np.bool_),
            clients,
            noise={h.sample_id: h.noise for h in rows if h.noise},
        )

    def __len__(self) -> int:
        return len(self.owner)

    def __iter__(self) -> Iterator[Holding]:
        return self._holdings(0, len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Manifest):
            return NotImplemented
        columns = ((self.owner, other.owner), (self.image, other.image), (self.text, other.text))
        same = (self.clients, self.schedule, self.noise) == (other.clients, other.schedule, other.noise)
        same = same and bool(self.ids.equals(other.ids))
        return same and all(np.array_equal(a, b) for a, b in columns)

    def _rows(self, start: int, stop: int) -> Iterator[tuple[str, int, bool, bool]]:
        """(sample id, client, has image, has text) of the rows from `start` up to `stop`."""
        for first in range(start, stop, _CHUNK):
            part = slice(first, min(stop, first + _CHUNK))
            columns = (self.ids[part].to_pylist(), *(c[part].tolist() for c in (self.owner, self.image, self.text)))
            yield from zip(*columns, strict=True)

    def _holdings(self, start: int, stop: int) -> Iterator[Holding]:
        for sample_id, client, image, text in self._rows(start, stop):
            yield Holding(sample_id, client, VISIBLE[image, text], self.noise.get(sample_id, ()))

    def of_client(self, client: int) -> list[Holding]:
        start, stop = np.searchsorted(self.owner, (client, client + 1)).tolist()
        return list(self._holdings(start, stop))

    def at(self, number: int) -> Manifest:
        """What clients see in this round of the schedule, as a manifest that does not change."""
        seen = [self.schedule.visible(client, number) for client in range(self.clients)]
        image, text = (np.array([m in has for has in seen], dtype=np.bool_)[self.owner] for m in MODALITIES)
        return Manifest(self.ids, self.owner, self.image & image, self.text & text, self.clients, noise=self.noise)

    def counts(self) -> NDArray[np.int64]:
        """(clients, 3): the number of samples that each client holds, of visible images, and of visible texts."""
        return self._count_by_client((None, self.image, self.text))

    def patterns(self) -> NDArray[np.int64]:
        """(clients, 4): the number of samples of which each client sees both modalities, the image only, the text only, and
        neither."""
        image, text = self.image, self.text
        return self._count_by_client((image & text, image & ~text, ~image & text, ~image & ~text))

    def _count_by_client(self, masks: Sequence[NDArray[np.bool_] | None]) -> NDArray[np.int64]:
        columns = [np.bincount(self.owner, weights=m, minlength=self.clients).astype(np.int64) for m in masks]
        return np.stack(columns, axis=1)

    def sizes(self) -> list[int]:
        """The number of samples that each client holds."""
        sizes: list[int] = self.counts()[:, 0].tolist()
        return sizes

    def digest(self) -> str:
        """SHA-256 over the rows, independent of the version of the Parquet library."""
        sha = hashlib.sha256()
        for sample_id, client, image, text in self._rows(0, len(self)):
            sha.update(f"{sample_id}\t{client}\t{_DIGESTED[image, text]}\n".encode())
            if sample_id in self.noise:
                sha.update(f"{_worded(self.noise[sample_id])}\n".encode())
        sha.update(self.schedule.to_json().encode())
        return sha.hexdigest()

    def write(self, path: Path) -> None:
        table = pa.table([self.ids, self.owner, self.image, self.text], schema=SCHEMA)
        if self.noise:
            table = table.append_column(_NOISE, pa.array([_worded(self.noise.get(i, ())) for i in self.ids.to_pylist()]))
        drift = {"schedule": self.schedule.to_json()} if self.schedule.changes else {}
        table = table.replace_schema_metadata({"clients": str(self.clients), "digest": self.digest(), **drift})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_atomically(path, buffer.getvalue())


def _worded(noise: Noise) -> str:
    """ "image blur 3;text typos 3"; empty if all is good."""
    return ";".join(f"{modality} {kind} {severity}" for modality, kind, severity in noise)


def _noise(worded: str) -> Noise:
    """Raises ValueError if the text is none that `_worded` gives."""
    parts = [part.split(" ") for part in worded.split(";")]
    return tuple((m, kind, int(severity)) for name, kind, severity in parts for m in MODALITIES if m == name)


def pooled(samples: Sequence[Sample]) -> Manifest:
    """All samples with all their modalities on one client, for centralised training."""
    ordered = Samples.of(samples).ordered()
    return Manifest(ordered.ids, np.zeros(len(ordered), dtype=np.int32), ordered.has_image, ordered.has_text, 1)


def read(path: Path) -> Manifest:
    """Raises DataError if the file is missing, is not a manifest, or was changed after it was written."""
    try:
        table = pq.read_table(path)
        metadata = table.schema.metadata or {}
        if table.schema.names not in (SCHEMA.names, [*SCHEMA.names, _NOISE]) or not metadata.keys() >= {b"clients", b"digest"}:
            raise DataError(f"{path}: is not a manifest; its columns must be {', '.join(SCHEMA.names)}.")
        columns = [column.combine_chunks() for column in table.select(SCHEMA.names).cast(SCHEMA).columns]
        worded = table.column(_NOISE).to_pylist() if _NOISE in table.schema.names else []
        noise = {i: _noise(text) for i, text in zip(columns[0].to_pylist(), worded, strict=False) if text}
        owner, image, text = (column.to_numpy(zero_copy_only=False) for column in columns[1:])
        schedule = Schedule.of_json(metadata.get(b"schedule", b"").decode())
        manifest = Manifest(columns[0], owner, image, text, int(metadata[b"clients"]), schedule, noise)
        # Unsorted rows also mean that the file was changed, and `of_client` would not find the rows of a client.
        intact = not any(column.null_count for column in columns) and not bool((np.diff(owner) < 0).any())
        intact = intact and manifest.digest() == metadata[b"digest"].decode()
        # The digest does not cover the number of clients.
        intact = intact and bool(0 <= owner.min(initial=0) <= owner.max(initial=0) < manifest.clients < 2**31)
    except (OSError, ValueError, pa.ArrowException) as error:  # a name that is no UTF-8 is a ValueError
        raise DataError(f"{path}: cannot be read as a manifest ({error}).") from None
    if not intact:
        raise DataError(f"{path}: its rows do not match its digest; write it again with `fedmllm partition`.")
    return manifest
