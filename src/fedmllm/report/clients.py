"""How clients differ, for the page in HTML: who holds what, and scores from the worst to the best client and by round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from fedmllm.evaluation.clients import modality_group
from fedmllm.report.convergence import speeds
from fedmllm.report.curves import Line, curves, mean_line
from fedmllm.report.html_page import HtmlPage
from fedmllm.report.page import Page
from fedmllm.report.scores import UNKNOWN
from fedmllm.report.sections import Chapter
from fedmllm.storage.run_dir import RunDir

_MOST_CLIENTS, _MOST_PLACES = 100, 12
_TENTHS = 10


def expected_scores(result: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """The score that each client can expect of the common model with these `metrics` of the patterns, by what its samples
    show (`evaluation.clients.client_scores`); empty if the result does not say how many samples show both, or if clients have
    models of their own."""
    metric, scores = result["primary_metric"], []
    neither = (result.get("modalities") or {}).get("drawn", {}).get("none")
    for row in result["per_client"]:
        if "metrics" in row or (neither != 0 and modality_group(row) == "mixed"):
            return []
        both = max(0, row["image"] + row["text"] - row["samples"])
        counts = {"both": both, "image": row["image"] - both, "text": row["text"] - both}
        if total := sum(counts.values()):
            values = [(n, metrics.get(pattern, {}).get(metric, math.nan)) for pattern, n in counts.items() if n]
            scores.append(sum(n * value for n, value in values) / total)
    return [] if any(map(math.isnan, scores)) else scores


def tenths(scores: Sequence[float]) -> list[float]:
    """The mean of each tenth of the clients, from the worst to the best; of each client, if there are fewer than ten. The
    first is the `worst_decile` of a result."""
    return [float(part.mean()) for part in np.array_split(np.sort(scores), min(_TENTHS, len(scores)))]


def add_curves(page: Page, chapter: Chapter) -> None:
    """The scores of federated cells over the rounds, the mean over runs, beside those of the worst tenth of the clients;
    nothing if no run was evaluated before its end."""
    convergence = speeds(chapter.folder, chapter.grid.rows)
    if convergence is None:
        return
    places: dict[str, dict[str, dict[str, Line]]] = {}
    for speed in convergence.rows:
        name = " · ".join(speed.axes[axis] for axis in chapter.downs)
        panels = places.setdefault(speed.axes.get(chapter.across, ""), {})
        row = next(row for row in chapter.grid.rows if row.axes == speed.axes)
        whole = [[(float(point.rounds), 100 * point.score) for point in points] for points in speed.units.values()]
        worst = [_worst_tenth(chapter, run) for run in row.units.values()]
        for label, runs in (("rounds", whole), ("rounds, worst tenth of clients", worst)):
            if runs and all(runs):
                panels.setdefault(label, {})[name] = mean_line(runs)
    page.heading(3, "Round by round", "The score after each evaluated round, the mean over the runs of a cell.")
    title = f"{chapter.grid.name}: score by round, %"
    page.picture(title, f"figures/{chapter.grid.name}-rounds.svg", curves(title, places))


def _worst_tenth(chapter: Chapter, run: str) -> list[tuple[float, float]]:
    """(rounds, score in percent) at each evaluation; empty if it is not known of all."""
    result, line = _result(chapter, run), list[tuple[float, float]]()
    for record in RunDir(chapter.folder / run).rounds():
        if metrics := record.get("metrics"):
            scores = expected_scores(result, metrics)
            if not scores:
                return []
            line.append((record["round"] + 1.0, 100 * tenths(scores)[0]))
    return line


def add_clients(page: Page, chapter: Chapter) -> None:
    """Each cell's clients from the worst to the best, the mean over its runs; then who holds what."""
    rows = []
    for row in chapter.grid.rows:
        results = [_result(chapter, run) for run in row.ids if row.kind in ("federated", "local")]
        scores = [[client["score"] for client in result["per_client"] if "score" in client] for result in results]
        runs = [tenths(of_run) for of_run in scores if of_run]
        if runs and len({len(run) for run in runs}) == 1:
            rows.append([*row.axes.values(), *(f"{100 * fmean(part):.1f}" for part in zip(*runs, strict=True))])
    if rows:
        axes = chapter.grid.axes
        width = max(map(len, rows)) - len(axes)
        rows = [[*row, *[UNKNOWN] * (width - len(row) + len(axes))] for row in rows]
        page.heading(
            3,
            "Clients from the worst to the best",
            "The score that clients can expect, given the modalities of their own samples. The clients of a run are ordered by "
            "their score and averaged in tenths, or one by one if there are fewer than ten; then follows the mean over runs.",
        )
        between = [f"{number}." for number in range(2, width)]
        names = ["worst", *between, "best"] if width > 1 else ["all"]
        page.table([*axes, *names], rows, len(axes), "heat")


def _result(chapter: Chapter, run: str) -> dict[str, Any]:
    return RunDir(chapter.folder / run).result()


def add_holdings(page: HtmlPage, chapter: Chapter) -> None:
    """Who holds what: for each distinct distribution, the clients of the first run that has it."""
    places: dict[tuple[Any, ...], tuple[list[str], dict[str, Any]]] = {}
    for row in chapter.grid.rows:
        if row.kind in ("federated", "local") and row.ids:
            result = _result(chapter, row.ids[0])
            held = tuple((c["client"], c["samples"], c["image"], c["text"]) for c in result["per_client"])
            name = row.axes[chapter.across] if chapter.across else " · ".join(row.axes.values())
            names, _ = places.setdefault(held, ([], result))
            names += [] if name in names else [name]
    places.pop((), None)
    if not places:
        return
    page.heading(3, "Who holds what", "The clients of the first run: their samples, and of how many they see image and text.")
    for names, result in list(places.values())[:_MOST_PLACES]:
        with page.folded(", ".join(names)):
            client_table(page, result)
    if len(places) > _MOST_PLACES:
        page.paragraph(f"{len(places) - _MOST_PLACES} more distributions are left out.")


def client_table(page: HtmlPage, result: Mapping[str, Any]) -> None:
    """A row a client, the worst tenth marked; the worst first, if clients have scores."""
    clients = sorted(result["per_client"], key=lambda row: row.get("score", math.inf))
    scored = sum("score" in row for row in clients)
    head = ["client", *(["score, %"] if scored else []), "samples", "image", "text", "missing, %", "rounds"]
    rows = []
    for row in clients[:_MOST_CLIENTS]:
        name = str(row.get("site") or row["client"]) + (" (attacker)" if row.get("attacker") else "")
        score = [f"{100 * row['score']:.1f}" if "score" in row else UNKNOWN] if scored else []
        counts = [str(row[key]) for key in ("samples", "image", "text")]
        rows.append([name, *score, *counts, f"{100 * row['gap']:.0f}", str(row.get("rounds", UNKNOWN))])
    differ = scored and clients[0]["score"] < clients[scored - 1]["score"]
    marked = range(math.ceil(scored / _TENTHS)) if differ else ()
    page.table(head, rows, 1, "bars", marked)
    if differ:
        page.paragraph("The worst tenth is marked.")
    if len(clients) > _MOST_CLIENTS:
        page.paragraph(f"Of {len(clients)} clients, the first {_MOST_CLIENTS} are shown.")
