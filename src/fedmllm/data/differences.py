"""How clients differ in what they see, what changes over the rounds, and what of it is corrupted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.manifest import Manifest
from fedmllm.data.samples import MODALITIES, Modality
from fedmllm.data.scenarios import BOTH, IMAGE, NONE, TEXT

_PATTERNS = (BOTH, IMAGE, TEXT, NONE)
_SEERS = {
    "both": "with pairs",
    "either": "with images and texts but no pairs",
    "image": "with images only",
    "text": "with texts only",
    "none": "with neither",
}


def rounds_shown(manifest: Manifest) -> NDArray[np.int32]:
    """(rows, 4): the number of rounds in which each row of the manifest shows both modalities, the image only, the text only,
    and neither; one round in all if nothing changes."""
    schedule = manifest.schedule
    allowed = np.zeros((manifest.clients, 4), dtype=np.int32)
    allowed[:, 0] = schedule.rounds
    for client in {change.client for change in schedule.changes}:
        allowed[client] = 0
        for _, length, visible in schedule.stretches(client):
            allowed[client, _PATTERNS.index(visible)] += length
    both, image, text, _ = allowed.T
    shown = np.empty((len(manifest), 4), dtype=np.int32)
    shown[:, 0] = manifest.image * manifest.text * both[manifest.owner]
    shown[:, 1] = manifest.image * (both + image)[manifest.owner] - shown[:, 0]
    shown[:, 2] = manifest.text * (both + text)[manifest.owner] - shown[:, 0]
    shown[:, 3] = schedule.rounds - shown[:, :3].sum(axis=1)
    return shown


def presence(manifest: Manifest, shown: NDArray[np.int32]) -> dict[str, dict[str, float]]:
    """How much the clients differ, over all rounds (`shown`, see `rounds_shown`); clients without samples are left out.

    {"clients": {both, either, image, text, none: number of clients}, "image": {"least", "median", "most": share of a client's
    samples that show the image}, "text": the same for the text}. A client counts as "both" if any of its samples shows both,
    and as "either" if it sees images and texts, but never together.
    """
    by_client = np.stack([np.bincount(manifest.owner, weights=w, minlength=manifest.clients) for w in shown.T], axis=1)
    held = by_client[by_client.sum(axis=1) > 0]
    both, image, text, _ = (held > 0).T
    kinds = {
        "both": both,
        "either": ~both & image & text,
        "image": ~both & image & ~text,
        "text": ~both & ~image & text,
        "none": ~(both | image | text),
    }
    differences: dict[str, dict[str, float]] = {"clients": {name: int(members.sum()) for name, members in kinds.items()}}
    for column, modality in enumerate(MODALITIES, start=1):
        shares = (held[:, 0] + held[:, column]) / held.sum(axis=1) if len(held) else np.zeros(1)
        ends = np.quantile(shares, (0, 0.5, 1)).round(6).tolist()
        differences[modality] = dict(zip(("least", "median", "most"), ends, strict=True))
    return differences


def schedule_counts(manifest: Manifest) -> dict[str, int] | None:
    """{"rounds": length of the schedule, "clients": number of clients that change after its first round, "changes": how often
    they do in all, "first": the round of the first change}; None if no client changes."""
    later = [change for change in manifest.schedule.changes if change.round]
    if not later:
        return None
    clients, first = len({change.client for change in later}), min(change.round for change in later)
    return {"rounds": manifest.schedule.rounds, "clients": clients, "changes": len(later), "first": first}


def noise_rows(manifest: Manifest) -> dict[Modality, dict[str, NDArray[np.bool_]]]:
    """modality -> kind and severity, as in "blur 3" -> for each row of the manifest whether it is corrupted this way."""
    rows: dict[tuple[Modality, str], NDArray[np.bool_]] = {}
    for row, sample_id in enumerate(manifest.ids.to_pylist() if manifest.noise else ()):
        for modality, kind, severity in manifest.noise.get(sample_id, ()):
            key = modality, f"{kind} {severity}"
            if key not in rows:
                rows[key] = np.zeros(len(manifest), dtype=np.bool_)
            rows[key][row] = True
    return {m: {name: rows[of, name] for of, name in sorted(rows) if of == m} for m in MODALITIES}


def noise_shares(manifest: Manifest, shown: NDArray[np.int32]) -> dict[str, dict[str, float]]:
    """modality -> kind and severity -> the share of the visible pictures or texts that are corrupted this way, over all rounds
    (`shown`, see `rounds_shown`)."""
    shares: dict[str, dict[str, float]] = {}
    for column, (modality, kinds) in enumerate(noise_rows(manifest).items(), start=1):
        visible = shown[:, 0] + shown[:, column]
        total = max(int(visible.sum()), 1)
        shares[modality] = {name: round(int(visible[rows].sum()) / total, 6) for name, rows in kinds.items()}
    return shares


def difference_lines(shares: Mapping[str, Any]) -> Iterator[str]:
    """The entries "presence", "changes" and "noise" of `modality_shares` as lines of text; none for what is as in `aligned`."""
    seen, changes = shares["presence"], shares["changes"]
    kinds = [f"{count} {_SEERS[name]}" for name, count in seen["clients"].items() if count]
    if len(kinds) > 1:
        yield f"clients: {', '.join(kinds)}"
    if any(seen[m]["least"] < 1 for m in MODALITIES):
        ends = [(m, *(100 * seen[m][end] for end in ("least", "most", "median"))) for m in MODALITIES]
        parts = [f"the {m} of {low:.1f} to {high:.1f} % (median {middle:.1f} %)" for m, low, high, middle in ends]
        yield f"a client sees {' and '.join(parts)} of its samples"
    if changes:
        yield (
            f"what clients see changes over {changes['rounds']} rounds: {changes['changes']} changes, "
            f"clients affected: {changes['clients']}, first change in round {changes['first']}"
        )
    for modality, corruptions in shares["noise"].items():
        if corruptions:
            listed = ", ".join(f"{name} in {100 * share:.1f} %" for name, share in corruptions.items())
            yield f"corrupted {modality}s: {100 * sum(corruptions.values()):.1f} % of those seen (kind and severity: {listed})"
