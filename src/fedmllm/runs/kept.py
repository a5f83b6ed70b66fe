"""How much of their updates robust aggregation kept, for each group of clients that hold the same modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmllm.evaluation.clients import MODALITY_GROUPS, modality_group


def kept_by_group(records: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each group that took part, honest clients and attackers (`attacker` in their rows) apart.

    {"group", "attacker", "clients" that sent an update, "updates" that were valid, "refused" ones, "kept": the mean share of
    a valid update that was kept, "below_half": the share of valid updates of which less than half was kept}. Empty for records
    without robust aggregation.
    """
    shares: dict[tuple[str, bool], list[tuple[int, float | None]]] = {}
    for record in records if any(record.get("kept") for record in records) else ():
        kept = {int(client): float(share) for client, share in record["kept"].items()}
        lost = record.get("clock", {}).get("lost", ())  # no update of theirs was refused, because none came
        for client in (client for client in record["sampled"] if client not in lost):
            key = modality_group(rows[client]), bool(rows[client].get("attacker"))
            shares.setdefault(key, []).append((client, kept.get(client)))
    summary = []
    for (group, attacker), sent in sorted(shares.items(), key=lambda item: (MODALITY_GROUPS.index(item[0][0]), item[0][1])):
        valid = [share for _, share in sent if share is not None]
        counts = {"clients": len({client for client, _ in sent}), "updates": len(valid), "refused": len(sent) - len(valid)}
        means = {name: round(sum(values) / len(valid), 6) if valid else None for name, values in (
            ("kept", valid), ("below_half", [float(share < 0.5) for share in valid])
        )}  # fmt: skip
        summary.append({"group": group, "attacker": attacker, **counts, **means})
    return summary
