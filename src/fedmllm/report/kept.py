"""Whose updates robust aggregation leaves out: whether it takes honest clients with unusual modalities for attackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmllm.report.page import Page
from fedmllm.report.scores import UNKNOWN
from fedmllm.report.sections import Chapter
from fedmllm.storage.run_dir import RunDir


def add_kept(page: Page, chapter: Chapter) -> None:
    """A row for each cell and group of clients. Runs without robust aggregation are left out."""
    table = []
    for row in chapter.grid.rows:
        groups: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
        for run in row.ids:
            for group in RunDir(chapter.folder / run).result().get("kept", ()):
                groups.setdefault((group["group"], group["attacker"]), []).append(group)
        for (name, attacker), of_runs in groups.items():
            label = f"{name}, attackers" if attacker else name
            clients = sum(group["clients"] for group in of_runs)
            table.append([" · ".join(row.axes.values()), label, str(clients), *(_mean(of_runs, key) for key in _MEANS)])
    if not table:
        return
    page.heading(
        3,
        "Who is trimmed",
        "How much of its updates robust aggregation keeps, by what a client's samples show. 100 % is the weight that an update "
        "has in the plain mean; the mean is over the updates of all runs, and so is the share of updates of which less than "
        "half is kept. Clients are counted once a run.",
    )
    page.table(["cell", "clients that hold", "clients", "kept, %", "less than half kept, %"], table, 2)


_MEANS = ("kept", "below_half")


def _mean(groups: Sequence[Mapping[str, Any]], key: str) -> str:
    """The mean over all updates of the runs, in percent."""
    counted = [group for group in groups if group["updates"] and group[key] is not None]
    updates = sum(group["updates"] for group in counted)
    return f"{100 * sum(group[key] * group['updates'] for group in counted) / updates:.1f}" if updates else UNKNOWN
