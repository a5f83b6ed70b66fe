"""Draw the manifest: deal the samples out to the clients, and decide what each client sees of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.manifest import Manifest
from fedmllm.data.min_samples import ensure_minimum
from fedmllm.data.partitions import Deal, GroupedDeal
from fedmllm.data.samples import MODALITIES, Modality, Sample
from fedmllm.data.scenarios import Modalities, Noise, Scenario, Visible, see_all
from fedmllm.data.schedule import Schedule
from fedmllm.data.stored import Samples, arrow
from fedmllm.errors import DataError
from fedmllm.rng import stream

Pool = frozenset[Modalities]
"""Samples that are distributed together, identified by the sets of modalities that they have."""


def _sorted_names(pool: Pool) -> list[list[str]]:
    return sorted(sorted(modalities) for modalities in pool)


def _pools(
    kinds: Sequence[Modalities], eligible: Mapping[Modalities, frozenset[int]], samples: Sequence[Sample], deal: Deal
) -> dict[Pool, array[int]]:
    """The indices of the samples in each pool, where sample i has the modalities `kinds[i]`.

    A sample is pooled with those of equal modalities. Samples that the deal keeps together are in one pool, if there is a
    client that may hold all of them.
    """
    own: dict[Modalities, Pool] = {kind: frozenset((kind,)) for kind in eligible}
    pool_of: Iterable[Pool] = (own[kind] for kind in kinds)
    if isinstance(deal, GroupedDeal):
        keys, kinds_by_key = [deal.key(s) for s in samples], dict[str, set[Modalities]]()
        for key, kind in zip(keys, kinds, strict=True):
            kinds_by_key.setdefault(key, set()).add(kind)
        shared = {
            key: frozenset(group)
            for key, group in kinds_by_key.items()
            if frozenset.intersection(*(eligible[kind] for kind in group))
        }
        pool_of = (shared.get(key, pool) for key, pool in zip(keys, pool_of, strict=True))
    pools: dict[Pool, array[int]] = {}
    for index, pool in enumerate(pool_of):
        pools.setdefault(pool, array("q")).append(index)
    return pools


def _assign(samples: Samples, deal: Deal, has: Sequence[Modalities], min_samples: int, seed: int) -> NDArray[np.int64]:
    """The client of each sample, where client c has the modalities `has[c]`."""
    kinds = samples.modalities()
    eligible = {
        kind: frozenset(client for client, own in enumerate(has) if not (kind and own) or kind & own) for kind in set(kinds)
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
        owner[indices] = deal(samples if len(pools) == 1 else samples.take(indices), clients, rng)
    return ensure_minimum(
        owner, [eligible[kind] for kind in kinds], len(has), min_samples, stream(seed, "partition", "minimum")
    )


def draw(
    samples: Sequence[Sample], deal: Deal, scenario: Scenario, clients: int, min_samples: int, seed: int, rounds: int = 1
) -> Manifest:
    """Draw which client holds each sample and which of its modalities the client sees, in each of the rounds if that changes.

    Samples are distributed in pools of equal modalities, each pool over the clients that have at least one of them: a
    text-only question goes to a client that has text. A client without any modality (see `Scenario.coin_per_sample`) may hold
    every sample. Samples that the scenario drops are not in the manifest. Raises DataError if no client may hold a pool, or if
    there are too few samples.
    """
    ordered = Samples.of(samples).ordered()
    if scenario.keeps is not None:
        ordered = ordered.take([i for i, s in enumerate(ordered) if scenario.keeps(s, stream(seed, "visible", s.id))])
    try:
        has = list(scenario.clients(clients, stream(seed, "scenario", "clients")))
        seen = scenario.seen(ordered, clients, stream(seed, "scenario", "rates"))
        then = [part.seen(ordered, clients, stream(seed, "scenario", i)) for i, part in enumerate(scenario.then)]
        changes = scenario.changes(clients, rounds, stream(seed, "scenario", "changes")) if scenario.changes else ()
    except ValueError as error:
        raise DataError(f"scenario: {error}; change it or partition.clients.") from None
    kinds = set(ordered.modalities())
    there = frozenset[Modality]().union(*kinds)
    empty = [client for client in range(clients) if has[client] and not has[client] & there]
    if empty and there and min_samples and all(kinds):
        raise DataError(
            f"under this scenario, {len(empty)} of {clients} clients have only {' and '.join(has[empty[0]])} "
            f"(client {empty[0]} is the first), and the samples have only {' and '.join(there)}; "
            'set scenario.name = "aligned", change the scenario\'s options, or add a task.companion with the other modality.'
        )
    owner = _assign(ordered, deal, has, min_samples, seed)
    noise: dict[str, Noise] = {}
    if seen is see_all and all(has) and not then and scenario.noise is None:  # the loop below, without draws
        image, text = _limited(ordered, np.array([[m in own for m in MODALITIES] for own in has], dtype=np.bool_)[owner].T)
    else:
        image, text = _drawn(ordered, owner, has, seen, then, scenario, seed, noise)
    by_client = np.argsort(owner, kind="stable")  # and by id within a client, because `ordered` is sorted by id
    columns = (owner[by_client].astype(np.int32), image[by_client], text[by_client])
    return Manifest(ordered.ids.take(arrow(by_client)), *columns, clients, Schedule.of(changes, rounds), noise)


def _limited(samples: Samples, has: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(2, samples): whether the image and the text of each sample are visible on clients that have `has` (2, samples)."""
    present = np.stack([samples.has_image, samples.has_text])
    visible = present & has
    return np.where(visible.any(axis=0), visible, present)


def _drawn(
    samples: Samples, owner: NDArray[np.int64], has: Sequence[Modalities], seen: Visible, then: Sequence[Visible],
    scenario: Scenario, seed: int, noise: dict[str, Noise],
) -> NDArray[np.bool_]:  # fmt: skip
    """As `_limited`, of what the scenario draws; adds to `noise` how bad it is."""
    shown = np.zeros((2, len(samples)), dtype=np.bool_)
    for index, (sample, client) in enumerate(zip(samples, map(int, owner), strict=True)):
        rng = stream(seed, "visible", sample.id)
        present = seen(sample, client, rng)
        own = has[client] or frozenset((MODALITIES[int(rng.integers(2))],))  # a client without modalities tosses a coin
        visible = present & own
        if present and not visible:  # it was to see the very modality that the sample lost or never had
            visible = sample.modalities & has[client] or present
        for number, part in enumerate(then):
            visible = visible & part(sample.showing(visible), client, stream(seed, "visible", number, sample.id))
        shown[:, index] = "image" in visible, "text" in visible
        if scenario.noise and (bad := scenario.noise(sample, visible, stream(seed, "noise", sample.id))):
            noise[sample.id] = bad
    return shown
