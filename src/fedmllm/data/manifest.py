"""The manifest: the result of partition and scenario as a table `sample_id, client, has_image, has_text` with a digest.

The same settings and seed give the same bytes on every machine, independent of the order in which files are listed.
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

from fedmllm.data.min_samples import ensure_minimum
from fedmllm.data.partitions import Deal, GroupedDeal
from fedmllm.data.samples import MODALITIES, Modality, Sample
from fedmllm.data.scenarios import Modalities, Scenario
from fedmllm.errors import DataError
from fedmllm.rng import stream
from fedmllm.storage.atomic import write_atomically

SCHEMA = pa.schema([("sample_id", pa.string()), ("client", pa.int32()), ("has_image", pa.bool_()), ("has_text", pa.bool_())])
Pool = frozenset[Modalities]
"""Samples that are distributed together, identified by the sets of modalities that they have."""
_CHUNK = 1 << 14
"""Rows that are converted to Python objects at a time when all rows are iterated over."""
_VISIBLE: dict[tuple[bool, bool], Modalities] = {
    (image, text): frozenset(m for m, present in zip(MODALITIES, (image, text), strict=True) if present)
    for image, text in product((False, True), repeat=2)
}
"""(has image, has text) -> the modalities."""
_DIGESTED = {flags: str(sorted(visible)) for flags, visible in _VISIBLE.items()}
"""(has image, has text) -> the modalities as they enter the digest."""


@dataclass(frozen=True)
class Holding:
    """One row: client `client` holds the sample and sees its modalities `visible`."""

    sample_id: str
    client: int
    visible: Modalities


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
        return bool(same) and all(np.array_equal(a, b) for a, b in columns)

    def _rows(self, start: int, stop: int) -> Iterator[tuple[str, int, bool, bool]]:
        """(sample id, client, has image, has text) of the rows from `start` up to `stop`."""
        for first in range(start, stop, _CHUNK):
            part = slice(first, min(stop, first + _CHUNK))
            columns = (self.ids[part].to_pylist(), *(c[part].tolist() for c in (self.owner, self.image, self.text)))
            yield from zip(*columns, strict=True)

    def _holdings(self, start: int, stop: int) -> Iterator[Holding]:
        for sample_id, client, image, text in self._rows(start, stop):
            yield Holding(sample_id, client, _VISIBLE[image, text])

    def of_client(self, client: int) -> list[Holding]:
        start, stop = np.searchsorted(self.owner, (client, client + 1)).tolist()
        return list(self._holdings(start, stop))

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
        return sha.hexdigest()

    def write(self, path: Path) -> None:
        table = pa.table([self.ids, self.owner, self.image, self.text], schema=SCHEMA)
        table = table.replace_schema_metadata({"clients": str(self.clients), "digest": self.digest()})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_atomically(path, buffer.getvalue())


def pooled(samples: Sequence[Sample]) -> Manifest:
    """All samples with all their modalities on one client, for centralised training."""
    return Manifest.of((Holding(s.id, 0, s.modalities) for s in sorted(samples, key=lambda s: s.id)), 1)


def read(path: Path) -> Manifest:
    """Raises DataError if the file is missing, is not a manifest, or was changed after it was written."""
    try:
        table = pq.read_table(path)
        metadata = table.schema.metadata or {}
        if table.schema.names != SCHEMA.names or not metadata.keys() >= {b"clients", b"digest"}:
            raise DataError(f"{path}: is not a manifest; its columns must be {', '.join(SCHEMA.names)}.")
        columns = [column.combine_chunks() for column in table.cast(SCHEMA).columns]
        owner, image, text = (column.to_numpy(zero_copy_only=False) for column in columns[1:])
        manifest = Manifest(columns[0], owner, image, text, int(metadata[b"clients"]))
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


def _sorted_names(pool: Pool) -> list[list[str]]:
    return sorted(sorted(modalities) for modalities in pool)


def _pools(
    kinds: Sequence[Modalities], eligible: Mapping[Modalities, frozenset[int]], samples: Sequence[Sample], deal: Deal
) -> dict[Pool, list[int]]:
    """The indices of the samples in each pool, where sample i has the modalities `kinds[i]`.

    A sample is pooled with those of equal modalities. Samples that the deal keeps together are in one pool, if there is a
    client that may hold all of them.
    """
    own: dict[Modalities, Pool] = {kind: frozenset((kind,)) for kind in eligible}
    pool_of = [own[kind] for kind in kinds]
    if isinstance(deal, GroupedDeal):
        keys, kinds_by_key = [deal.key(s) for s in samples], dict[str, set[Modalities]]()
        for key, kind in zip(keys, kinds, strict=True):
            kinds_by_key.setdefault(key, set()).add(kind)
        shared = {
            key: frozenset(group)
            for key, group in kinds_by_key.items()
            if frozenset.intersection(*(eligible[kind] for kind in group))
        }
        pool_of = [shared.get(key, pool) for key, pool in zip(keys, pool_of, strict=True)]
    pools: dict[Pool, list[int]] = {}
    for index, pool in enumerate(pool_of):
        pools.setdefault(pool, []).append(index)
    return pools


def _assign(samples: Sequence[Sample], deal: Deal, has: Sequence[Modalities], min_samples: int, seed: int) -> NDArray[np.int64]:
    """The client of each sample, where client c has the modalities `has[c]`."""
    # One object per distinct set: a separate one for each of 100,000 samples would take much memory.
    interned: dict[Modalities, Modalities] = {}
    kinds = [interned.setdefault(modalities, modalities) for modalities in (s.modalities for s in samples)]
    eligible = {
        kind: frozenset(client for client, own in enumerate(has) if not (kind and own) or kind & own) for kind in interned
    }
    owner = np.empty(len(samples), dtype=np.int64)
    pools = _pools(kinds, eligible, samples, deal)
    for pool in sorted(pools, key=_sorted_names):
        indices, names = pools[pool], _sorted_names(pool)
        clients = sorted(frozenset.intersection(*(eligible[kind] for kind in pool)))
        if not clients:
            raise DataError(
                f"{len(indices)} samples have only {' and '.join(names[0])}, which no client has; change the "
                "scenario's options, the seed, or the number of clients."
            )
        rng = stream(seed, "partition", *(names[0] if len(names) == 1 else map("+".join, names)))
        owner[indices] = deal([samples[i] for i in indices], clients, rng)
    return ensure_minimum(
        owner, [eligible[kind] for kind in kinds], len(has), min_samples, stream(seed, "partition", "minimum")
    )


def draw(samples: Sequence[Sample], deal: Deal, scenario: Scenario, clients: int, min_samples: int, seed: int) -> Manifest:
    """Draw which client holds each sample and which of its modalities the client sees.

    Samples are distributed in pools of equal modalities, each pool over the clients that have at least one of them: a
    text-only question goes to a client that has text. A client without any modality (see `Scenario.coin_per_sample`) may hold
    every sample. Samples that the scenario drops are not in the manifest. Raises DataError if no client may hold a pool, or if
    there are too few samples.
    """
    ordered = sorted(samples, key=lambda s: s.id)
    if scenario.keeps is not None:
        ordered = [s for s in ordered if scenario.keeps(s, stream(seed, "visible", s.id))]
    try:
        has = list(scenario.clients(clients, stream(seed, "scenario", "clients")))
    except ValueError as error:
        raise DataError(f"scenario: {error}; change it or partition.clients.") from None
    there = frozenset[Modality]().union(*(s.modalities for s in ordered))
    empty = [client for client in range(clients) if has[client] and not has[client] & there]
    if empty and there and min_samples and all(s.modalities for s in ordered):
        raise DataError(
            f"under this scenario, {len(empty)} of {clients} clients have only {' and '.join(has[empty[0]])} "
            f"(client {empty[0]} is the first), and the samples have only {' and '.join(there)}; "
            'set scenario.name = "aligned", change the scenario\'s options, or add a task.companion with the other modality.'
        )
    owner = _assign(ordered, deal, has, min_samples, seed)
    image, text = np.zeros((2, len(ordered)), dtype=np.bool_)
    for index, (sample, client) in enumerate(zip(ordered, owner.tolist(), strict=True)):
        rng = stream(seed, "visible", sample.id)
        present = scenario.visible(sample, client, rng)
        own = has[client] or frozenset((MODALITIES[int(rng.integers(2))],))  # a client without modalities tosses a coin
        visible = present & own
        if present and not visible:  # it was to see the very modality that the sample lost or never had
            visible = sample.modalities & has[client] or present
        image[index], text[index] = "image" in visible, "text" in visible
    by_client = np.argsort(owner, kind="stable")  # and by id within a client, because `ordered` is sorted by id
    ids = pa.array([s.id for s in ordered], pa.string()).take(by_client)
    return Manifest(ids, owner[by_client].astype(np.int32), image[by_client], text[by_client], clients)
