"""Partition and scenario together, as one table `sample_id, client, has_image, has_text` with a digest.

The same settings and seed give the same bytes on every machine, in whatever order files were listed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedmllm.data.minimum import ensure_minimum
from fedmllm.data.partitions import Deal, Together
from fedmllm.data.samples import MODALITIES, Sample
from fedmllm.data.scenarios import BOTH, Modalities, Scenario
from fedmllm.errors import DataError
from fedmllm.rng import stream
from fedmllm.storage.atomic import write_atomically

SCHEMA = pa.schema([("sample_id", pa.string()), ("client", pa.int32()), ("has_image", pa.bool_()), ("has_text", pa.bool_())])
Pool = frozenset[Modalities]
"""Samples that are dealt out together, by the modalities that they have."""
_CHUNK = 1 << 14
"""Rows that are objects at a time where all are gone over."""
_VISIBLE: dict[tuple[bool, bool], Modalities] = {
    (image, text): frozenset(m for m, there in zip(MODALITIES, (image, text), strict=True) if there)
    for image, text in product((False, True), repeat=2)
}
_SHOWN = {seen: str(sorted(visible)) for seen, visible in _VISIBLE.items()}
"""A row's modalities as the digest has them."""


@dataclass(frozen=True)
class Holding:
    """One row: client `client` holds the sample and sees `visible` of it."""

    sample_id: str
    client: int
    visible: Modalities


@dataclass(frozen=True, eq=False)
class Manifest:
    """The rows as columns of equal length, sorted by client: a client's rows are a slice, and a row takes the bytes of its id
    and ten more. Going over a manifest makes its Holdings one by one.

    `ids` is an Arrow array of strings, `owner` has the client of each row, `image` and `text` whether it sees them;
    `clients` is the number of clients, of which some may hold nothing.
    """

    ids: pa.StringArray
    owner: NDArray[np.int32]
    image: NDArray[np.bool_]
    text: NDArray[np.bool_]
    clients: int

    @classmethod
    def of(cls, holdings: Iterable[Holding], clients: int) -> Manifest:
        """Rows in the order of the clients, those of one client in the order that they come in."""
        rows = sorted(holdings, key=lambda h: h.client)
        return cls(
            pa.array([h.sample_id for h in rows], pa.string()),
            np.array([h.client for h in rows], dtype=np.int32),
            np.array(["image" in h.visible for h in rows], dtype=np.bool_),
            np.array(["text" in h.visible for h in rows], dtype=np.bool_),
            clients,
        )

    def __len__(self) -> int:
        return len(self.owner)

    def __iter__(self) -> Iterator[Holding]:
        return self._holdings(0, len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Manifest):
            return NotImplemented
        columns = ((self.owner, other.owner), (self.image, other.image), (self.text, other.text))
        same = self.clients == other.clients and self.ids.equals(other.ids)
        return bool(same) and all(np.array_equal(mine, its) for mine, its in columns)

    def _rows(self, start: int, stop: int) -> Iterator[tuple[str, int, bool, bool]]:
        """(sample id, client, sees the image, sees the text) of the rows from `start` up to `stop`."""
        for first in range(start, stop, _CHUNK):
            part = slice(first, min(stop, first + _CHUNK))
            yield from zip(
                self.ids[part].to_pylist(),
                self.owner[part].tolist(),
                self.image[part].tolist(),
                self.text[part].tolist(),
                strict=True,
            )

    def _holdings(self, start: int, stop: int) -> Iterator[Holding]:
        for sample_id, client, image, text in self._rows(start, stop):
            yield Holding(sample_id, client, _VISIBLE[image, text])

    def of_client(self, client: int) -> list[Holding]:
        start, stop = np.searchsorted(self.owner, (client, client + 1)).tolist()
        return list(self._holdings(start, stop))

    def counts(self) -> NDArray[np.int64]:
        """(clients, 3): how many samples each client holds, of how many it sees the image, of how many the text."""
        weights = (None, self.image, self.text)
        columns = [np.bincount(self.owner, weights=w, minlength=self.clients).astype(np.int64) for w in weights]
        return np.stack(columns, axis=1)

    def patterns(self) -> NDArray[np.int64]:
        """(clients, 3): of how many samples each client sees both modalities, the image alone, the text alone."""
        masks = (self.image & self.text, self.image & ~self.text, ~self.image & self.text)
        columns = [np.bincount(self.owner, weights=m, minlength=self.clients).astype(np.int64) for m in masks]
        return np.stack(columns, axis=1)

    def sizes(self) -> list[int]:
        """Samples held by each client."""
        sizes: list[int] = self.counts()[:, 0].tolist()
        return sizes

    def digest(self) -> str:
        """SHA-256 over the rows, independent of the Parquet library's version."""
        sha = hashlib.sha256()
        for sample_id, client, image, text in self._rows(0, len(self)):
            sha.update(f"{sample_id}\t{client}\t{_SHOWN[image, text]}\n".encode())
        return sha.hexdigest()

    def pooled(self, samples: Sequence[Sample]) -> Manifest:
        """All samples with all their modalities on one client: what centralised training sees."""
        has = {s.id: s.modalities for s in samples}
        return Manifest.of((Holding(sample_id, 0, has[sample_id]) for sample_id in sorted(self.ids.to_pylist())), 1)

    def write(self, path: Path) -> None:
        table = pa.table([self.ids, self.owner, self.image, self.text], schema=SCHEMA)
        table = table.replace_schema_metadata({"clients": str(self.clients), "digest": self.digest()})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_atomically(path, buffer.getvalue())


def read(path: Path) -> Manifest:
    """Raises DataError where the file is missing, no manifest, or was changed since it was written."""
    try:
        table = pq.read_table(path)
        metadata = table.schema.metadata or {}
        if table.schema.names != SCHEMA.names or not metadata.keys() >= {b"clients", b"digest"}:
            raise DataError(f"{path}: is not a manifest; its columns must be {', '.join(SCHEMA.names)}.")
        columns = [column.combine_chunks() for column in table.cast(SCHEMA).columns]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as a manifest ({error}).") from None
    owner, image, text = (column.to_numpy(zero_copy_only=False) for column in columns[1:])
    manifest = Manifest(columns[0], owner, image, text, int(metadata[b"clients"]))
    # Rows out of order are rows that were changed: a client's would not be found.
    whole = not any(column.null_count for column in columns) and not bool((np.diff(owner) < 0).any())
    if not whole or manifest.digest() != metadata[b"digest"].decode():
        raise DataError(f"{path}: its rows do not match its digest; write it again with `fedmllm partition`.")
    return manifest


def _named(pool: Pool) -> list[list[str]]:
    return sorted(sorted(kind) for kind in pool)


def _pools(
    samples: Sequence[Sample], had: Sequence[Modalities], able: Mapping[Modalities, frozenset[int]], deal: Deal
) -> list[Pool]:
    """Of each sample the pool it is dealt out in: its own modalities, or those of all that it is kept together with, where
    some client is able to hold them all."""
    own = {kind: frozenset((kind,)) for kind in able}
    if not isinstance(deal, Together):
        return [own[kind] for kind in had]
    keys, kinds = [deal.key(s) for s in samples], dict[str, set[Modalities]]()
    for key, kind in zip(keys, had, strict=True):
        kinds.setdefault(key, set()).add(kind)
    whole = {key: frozenset(found) for key, found in kinds.items() if frozenset.intersection(*(able[kind] for kind in found))}
    return [whole.get(key, own[kind]) for key, kind in zip(keys, had, strict=True)]


def draw(samples: Sequence[Sample], deal: Deal, scenario: Scenario, clients: int, min_samples: int, seed: int) -> Manifest:
    """Who holds what and sees what of it.

    Samples are dealt out within pools of equal modalities, each pool among the clients that have at least one of its
    modalities: a text-only question goes to a client that has text. What a partition keeps together is in one pool, where
    some client may hold all of it. Raises DataError where a pool has no client, or there are too few samples.
    """
    ordered = sorted(samples, key=lambda s: s.id)
    try:
        has = list(scenario.clients(clients, stream(seed, "scenario", "clients")))
    except ValueError as error:
        raise DataError(f"scenario: {error}; change it or partition.clients.") from None
    found: dict[Modalities, Modalities] = {}  # one object for all equal sets: a hundred thousand of them are heavy
    had = [found.setdefault(modalities, modalities) for modalities in (s.modalities for s in ordered)]
    able_to_hold = {kind: frozenset(c for c in range(clients) if not kind or kind & has[c]) for kind in found}
    eligible = [able_to_hold[kind] for kind in had]
    owner = np.empty(len(ordered), dtype=np.int64)
    pools: dict[Pool, list[int]] = {}
    for index, pool in enumerate(_pools(ordered, had, able_to_hold, deal)):
        pools.setdefault(pool, []).append(index)
    for pool in sorted(pools, key=_named):
        members, names = pools[pool], _named(pool)
        able = sorted(frozenset.intersection(*(able_to_hold[kind] for kind in pool)))
        if not able:
            raise DataError(
                f"{len(members)} samples have only {' and '.join(names[0])} and no client has that; change the "
                "scenario's options, the seed, or the number of clients."
            )
        pool_rng = stream(seed, "partition", *(names[0] if len(names) == 1 else map("+".join, names)))
        owner[members] = deal([ordered[i] for i in members], able, pool_rng)
    owner = ensure_minimum(owner, eligible, clients, min_samples, stream(seed, "partition", "minimum"))
    image, text = np.zeros((2, len(ordered)), dtype=np.bool_)
    for index, (sample, client) in enumerate(zip(ordered, owner.tolist(), strict=True)):
        there = scenario.visible(sample, stream(seed, "visible", sample.id))
        seen = there & has[client]
        if there and not seen:  # the client's one modality is the one the sample lost: it keeps what the client can see
            seen = had[index] & has[client]
        image[index], text[index] = "image" in seen, "text" in seen
    by_client = np.argsort(owner, kind="stable")  # and by id within a client, as `ordered` is
    ids = pa.array([s.id for s in ordered], pa.string()).take(by_client)
    return Manifest(ids, owner[by_client].astype(np.int32), image[by_client], text[by_client], clients)


__all__ = ["BOTH", "SCHEMA", "Holding", "Manifest", "draw", "read"]
