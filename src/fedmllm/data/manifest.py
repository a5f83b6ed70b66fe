"""Partition and scenario together, as one table `sample_id, client, has_image, has_text` with a digest.

The same settings and seed give the same bytes on every machine, in whatever order files were listed.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedmllm.data.partition import Deal, ensure_minimum
from fedmllm.data.samples import Sample
from fedmllm.data.scenarios import BOTH, Modalities, Scenario
from fedmllm.errors import DataError
from fedmllm.rng import stream
from fedmllm.tensors import write_atomically

SCHEMA = pa.schema([("sample_id", pa.string()), ("client", pa.int32()), ("has_image", pa.bool_()), ("has_text", pa.bool_())])


@dataclass(frozen=True)
class Holding:
    """One row: client `client` holds the sample and sees `visible` of it."""

    sample_id: str
    client: int
    visible: Modalities


@dataclass(frozen=True)
class Manifest:
    holdings: tuple[Holding, ...]
    clients: int

    def of_client(self, client: int) -> list[Holding]:
        return [h for h in self.holdings if h.client == client]

    def sizes(self) -> list[int]:
        """Samples held by each client."""
        counts = Counter(h.client for h in self.holdings)
        return [counts[client] for client in range(self.clients)]

    def digest(self) -> str:
        """SHA-256 over the rows, independent of the Parquet library's version."""
        lines = (f"{h.sample_id}\t{h.client}\t{sorted(h.visible)}\n" for h in self.holdings)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def pooled(self, samples: Sequence[Sample]) -> Manifest:
        """All samples with all their modalities on one client: what centralised training sees."""
        has = {s.id: s.modalities for s in samples}
        rows = sorted(h.sample_id for h in self.holdings)
        return Manifest(tuple(Holding(sample_id, 0, has[sample_id]) for sample_id in rows), 1)

    def write(self, path: Path) -> None:
        columns = [
            [h.sample_id for h in self.holdings],
            [h.client for h in self.holdings],
            ["image" in h.visible for h in self.holdings],
            ["text" in h.visible for h in self.holdings],
        ]
        table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
        table = table.replace_schema_metadata({"clients": str(self.clients), "digest": self.digest()})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_atomically(path, buffer.getvalue())


def read(path: Path) -> Manifest:
    """Raises DataError where the file is missing, no manifest, or was changed since it was written."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as a manifest ({error}).") from None
    metadata = table.schema.metadata or {}
    if table.schema.names != SCHEMA.names or not metadata.keys() >= {b"clients", b"digest"}:
        raise DataError(f"{path}: is not a manifest; its columns must be {', '.join(SCHEMA.names)}.")
    rows = tuple(
        Holding(row["sample_id"], row["client"], frozenset(m for m in ("image", "text") if row[f"has_{m}"]))
        for row in table.to_pylist()
    )
    manifest = Manifest(rows, int(metadata[b"clients"]))
    if manifest.digest() != metadata[b"digest"].decode():
        raise DataError(f"{path}: its rows do not match its digest; write it again with `fedmllm partition`.")
    return manifest


def draw(samples: Sequence[Sample], deal: Deal, scenario: Scenario, clients: int, min_samples: int, seed: int) -> Manifest:
    """Who holds what and sees what of it.

    Samples are dealt out within pools of equal modalities, each pool among the clients that have at least one of its
    modalities: a text-only question goes to a client that has text. Raises DataError where a pool has no such client,
    or there are too few samples.
    """
    ordered = sorted(samples, key=lambda s: s.id)
    try:
        has = list(scenario.clients(clients, stream(seed, "scenario", "clients")))
    except ValueError as error:
        raise DataError(f"scenario: {error}; change it or partition.clients.") from None
    kinds = {s.modalities for s in ordered}
    able_to_hold = {kind: frozenset(c for c in range(clients) if not kind or kind & has[c]) for kind in kinds}
    eligible = [able_to_hold[s.modalities] for s in ordered]
    owner = np.empty(len(ordered), dtype=np.int64)
    pools: dict[Modalities, list[int]] = {}
    for index, sample in enumerate(ordered):
        pools.setdefault(sample.modalities, []).append(index)
    for modalities in sorted(pools, key=sorted):
        members = pools[modalities]
        able = sorted(eligible[members[0]])
        if not able:
            raise DataError(
                f"{len(members)} samples have only {' and '.join(sorted(modalities))} and no client has that; change the "
                "scenario's options, the seed, or the number of clients."
            )
        pool_rng = stream(seed, "partition", *sorted(modalities))
        owner[members] = deal([ordered[i] for i in members], able, pool_rng)
    owner = ensure_minimum(owner, eligible, clients, min_samples, stream(seed, "partition", "minimum"))
    holdings = []
    for index, sample in enumerate(ordered):
        there = scenario.visible(sample, stream(seed, "visible", sample.id))
        seen = there & has[int(owner[index])]
        if there and not seen:  # the client's one modality is the one the sample lost: it keeps what the client can see
            seen = sample.modalities & has[int(owner[index])]
        holdings.append(Holding(sample.id, int(owner[index]), seen))
    holdings.sort(key=lambda h: (h.client, h.sample_id))
    return Manifest(tuple(holdings), clients)


__all__ = ["BOTH", "SCHEMA", "Holding", "Manifest", "draw", "read"]
