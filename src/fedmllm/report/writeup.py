"""The page of results: sweeps' folders in, Markdown and pictures out. The same folders give the same bytes."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmllm.errors import RunError
from fedmllm.report.convergence import speeds
from fedmllm.report.gap_closed import BASELINES, scenario_ways, ways
from fedmllm.report.grids import place_of, read_grid
from fedmllm.report.radar import radar
from fedmllm.report.significance import AnswerCache, against, signed
from fedmllm.report.verdicts import verdicts

HEAD = """# Results

Made by `fedmllm report` from run folders alone; do not edit. Scores are in percent, mean ± s.d. over seeds (no ± where
there is one); \\* not all seeds are complete. How the tests are done is in [sweeps.md](sweeps.md).
"""


@dataclass
class Page:
    """Markdown, and the pictures that it shows by their names."""

    lines: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
        """The first `left` columns are words, the others figures."""
        self.lines += ["", "| " + " | ".join(map(_cell, head)) + " |"]
        self.lines.append("|" + "|".join("---" if i < left else "---:" for i in range(len(head))) + "|")
        self.lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def score(cell: Mapping[str, Any] | None) -> str:
    """ "71.3 ± 0.8", with a star where seeds are missing."""
    if cell is None or cell.get("mean") is None:
        return "–"
    spread = f" ± {100 * cell['sd']:.1f}" if cell.get("sd") is not None else ""
    return f"{100 * cell['mean']:.1f}{spread}" + ("*" if cell.get("missing") else "")


def mean(values: Sequence[float | None]) -> float | None:
    """None where one is not known: a mean over other settings would not compare."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def page(folders: Sequence[Path], baseline: str | None = None) -> Page:
    """All sweeps, a chapter each. Raises RunError where a folder is no sweep's or has nothing complete, or two share a name."""
    grids: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for folder in folders:
        if not (folder / "sweep.json").is_file():
            raise RunError(f"{folder} is no sweep's folder; give what `fedmllm sweep` made.")
        grid: Mapping[str, Any] = read_grid(folder)
        if grid["name"] in grids:
            raise RunError(f"{folder}: another folder is a sweep named {grid['name']!r} too; give one of them.")
        if not grid["axes"] or not any(row["ids"] for row in grid["rows"]):
            raise RunError(f"{folder} has no complete run on an axis; run the sweep first.")
        grids[grid["name"]] = folder, grid
    made = Page([HEAD.rstrip()])
    if len(grids) > 1:
        made.lines += ["", *(f"- [{name}](#{_anchor(name)}): {_extent(grid)}" for name, (_, grid) in grids.items())]
    for folder, grid in grids.values():
        _chapter(made, folder, grid, baseline)
    made.lines.append("")
    return made


def _anchor(heading: str) -> str:
    """What Markdown's readers make of a heading's plain letters; sweeps' names have hardly others."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()))


def _extent(grid: Mapping[str, Any]) -> str:
    rows = grid["rows"]
    first = next(row for row in rows if row["ids"])
    metrics = " or ".join(dict.fromkeys(row["metric"] for row in rows if row["ids"]))
    complete = sum(bool(row["ids"]) and not row["missing"] for row in rows)
    runs = len({i for row in rows for i in row["ids"]})
    return f"{metrics} under the pattern `{first['pattern']}`; {complete} of {len(rows)} cells complete, {runs} runs"


def _chapter(made: Page, folder: Path, grid: Mapping[str, Any], baseline: str | None) -> None:
    rows, axes = grid["rows"], grid["axes"]
    across, downs = (axes[0], axes[1:]) if len(axes) > 1 else ("", axes)
    first = next(row for row in rows if row["ids"])
    made.lines += ["", f"## {grid['name']}", "", f"{_extent(grid)}."]
    if first["pattern"] in first.get("ceiling", {}):
        best = ", ".join(f"{100 * value:.1f} ({name})" for name, value in first["ceiling"].items())
        made.lines.append(f"The best that any model can reach is known: {best}.")
    columns = list(dict.fromkeys(row["axes"].get(across, "") for row in rows))
    methods: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        methods.setdefault(tuple(row["axes"][a] for a in downs), {})[row["axes"].get(across, "")] = row
    averages = {name: mean([found.get(c, {}).get("mean") for c in columns]) for name, found in methods.items()}
    if _mixed(grid):
        averages = dict.fromkeys(averages)
    made.table(
        [*downs, *(c or "score" for c in columns), *(["mean"] if len(columns) > 1 else [])],
        [
            [*name, *(score(found.get(c)) for c in columns), *([score({"mean": averages[name]})] if len(columns) > 1 else [])]
            for name, found in methods.items()
        ],
        len(downs),
    )
    if len(columns) > 2:
        lines = {" · ".join(n): [_percent(f.get(c, {}).get("mean")) for c in columns] for n, f in methods.items()}
        picture = f"figures/{grid['name']}.svg"
        made.pictures[picture] = radar(f"{grid['name']}: {first['metric']}, %", columns, lines)
        made.lines += ["", f"![{grid['name']}: an axis a setting, a line a method]({picture})"]
    taken = AnswerCache(folder)
    _way(made, ways(taken, grid), scenario_ways(taken, grid))
    tested = _significance(made, folder, grid, baseline, taken)
    _patterns(made, methods, columns, downs)
    _transfer(made, methods, downs, across)
    _cost(made, methods, columns, downs)
    _speed(made, folder, grid)
    made.lines += ["", "### What did not work", ""]
    made.lines += [f"- {line}" for line in verdicts(grid, tested)]


def _mixed(grid: Mapping[str, Any]) -> bool:
    """Whether scores are of several metrics: a mean of AUC and accuracy is none."""
    return len({row["metric"] for row in grid["rows"] if row["ids"]}) > 1


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def choose_baseline(grid: Mapping[str, Any], asked: str | None) -> str:
    """What was asked for where this grid has it, else its zero-shot cell, else the first cell of its last axis."""
    names = [name for axis in grid["axes"] for name in dict.fromkeys(row["axes"][axis] for row in grid["rows"])]
    if asked in names:
        return str(asked)
    untrained = [row["axes"] for row in grid["rows"] if row["kind"] == "zero-shot"]
    for axis in reversed(grid["axes"]) if untrained else ():
        if len({cell[axis] for cell in untrained}) == 1:
            return str(untrained[0][axis])
    return str(grid["rows"][0]["axes"][grid["axes"][-1]])


def _way(made: Page, places: Sequence[Mapping[str, Any]], scenarios: Sequence[Mapping[str, Any]]) -> None:
    if not places:
        return
    made.lines += ["", "### Between the baselines", ""]
    made.lines.append(
        "The best federated method of each place, chosen by this very score, and its points above the baselines with paired "
        "95 % intervals over the test samples. The share is of the way from zero-shot to centralised."
    )
    _lead(made, "place", "places", [(" · ".join(one["place"]), one) for one in places])
    if scenarios:
        made.lines += ["", "The same for the mean over the places of a scenario; best is the best by that mean."]
        _lead(made, "scenario", "scenarios", [(f"{one['scenario']} ({one['places']})", one) for one in scenarios])


def _lead(made: Page, unit: str, units: str, found: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    rows = []
    for name, one in found:
        above = [_points(one["above"].get(kind)) for kind in BASELINES[:2]]
        share = "–" if one["share"] is None else f"{100 * one['share']:.0f} %"
        scores = [score({"mean": one[kind]}) for kind in BASELINES]
        rows.append([name, *scores, one["best"], score({"mean": one["score"]}), *above, share])
    head = [unit, *BASELINES, "best", "its score", *(f"above {kind}" for kind in BASELINES[:2]), "share"]
    made.table(head, rows)
    for kind in BASELINES[:2]:
        if told := [one for _, one in found if kind in one["above"]]:
            sure = sum(one["above"][kind]["ci"][0] > 0 for one in told)
            made.lines += ["", f"The whole interval is above {kind} in {sure} of {len(told)} {units}."]


def _points(one: Mapping[str, Any] | None) -> str:
    """ "+3.2 [+1.0, +5.4]", in points."""
    if one is None:
        return "–"
    low, high = (100 * value for value in one["ci"])
    return f"{100 * one['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _significance(
    made: Page, folder: Path, grid: Mapping[str, Any], baseline: str | None, taken: AnswerCache
) -> dict[str, Any]:
    found = against(folder, grid, choose_baseline(grid, baseline), taken)
    if not found["comparisons"]:
        return found
    made.lines += ["", f"### Against {found['baseline']}", ""]
    axis = found["axis"]
    places = list(dict.fromkeys(place_of(one, axis) for one in found["comparisons"]))
    last = " The last columns: over all places of the grid." if len(places) > 1 else ""
    made.lines.append(
        "Points of difference; p by paired tests, corrected after Holm. A place's p is about other test samples for the same "
        f"seeds: where seeds disagree much, others may say otherwise.{last}"
    )
    by = {(one["axes"][axis], place_of(one, axis)): one for one in found["comparisons"]}
    rows = []
    for one in found["overall"]:
        row = [one[axis], *(signed(by[one[axis], place]) if (one[axis], place) in by else "–" for place in places)]
        if len(places) > 1:
            row += ["–" if _mixed(grid) else signed(one), f"{one['better']} of {one['places']}"]
        rows.append(row)
    general = ["over all", "better in"] if len(places) > 1 else []
    made.table([axis, *(" · ".join(place) or "difference" for place in places), *general], rows)
    return found


def _patterns(
    made: Page, methods: Mapping[tuple[str, ...], Mapping[str, Any]], columns: Sequence[str], downs: Sequence[str]
) -> None:
    names = list(dict.fromkeys(n for found in methods.values() for row in found.values() for n in row["patterns"]))
    if len(names) < 2:
        return
    made.lines += ["", "### Trained in × tested with", ""]
    made.lines.append(
        "Test questions with both modalities or one alone; the last column is what the worst tenth of clients can expect."
    )
    rows = []
    for name, found in methods.items():
        known = {column: found[column] for column in columns if column in found and found[column]["ids"]}
        if len(known) > 1 and len({tuple(row["ids"]) for row in known.values()}) == 1:  # one run under several names
            known = {"any": next(iter(known.values()))}
        for column, row in known.items():
            cells = [score({"missing": row["missing"], **row["patterns"][n]}) if n in row["patterns"] else "–" for n in names]
            rows.append([*name, column, *cells, score({"missing": row["missing"], **row["worst_decile"]})])
    made.table([*downs, "trained in", *names, "worst tenth"], rows, len(downs) + 1)


def _transfer(made: Page, methods: Mapping[tuple[str, ...], Mapping[str, Any]], downs: Sequence[str], across: str) -> None:
    cells = [(name, column, row) for name, found in methods.items() for column, row in found.items() if row["ids"]]
    others = {task: one["metric"] for _, _, row in cells for task, one in row["transfer"].items()}
    if not others:
        return
    made.lines += ["", "### Trained here × tested there", "", "The final model on the test sets of these tasks."]
    rows = []
    for name, column, row in cells:
        scores = [score({"missing": row["missing"], **row["transfer"].get(task, {})}) for task in others]
        rows.append([*name, *([column] if across else []), *scores])
    head = [*downs, *([across] if across else [])]
    made.table([*head, *(f"{task}, {metric}" for task, metric in others.items())], rows, len(head))


def _cost(
    made: Page, methods: Mapping[tuple[str, ...], Mapping[str, Any]], columns: Sequence[str], downs: Sequence[str]
) -> None:
    made.lines += [
        "",
        "### Cost",
        "",
        "A run's mean: what travels up and down, and the wall-clock seconds of the machine that made it.",
    ]
    spread = [[row["bytes"] for row in found.values() if row["bytes"] is not None] for found in methods.values()]
    if any(known and max(known) > 1.01 * min(known) for known in spread):  # the setting decides it, as a rank does
        rows = [
            [*name, *(" MB, ".join(_paid([found[c]])) + " s" if c in found else "–" for c in columns)]
            for name, found in methods.items()
        ]
        made.table([*downs, *columns], rows, len(downs))
    else:
        rows = [[*name, *_paid(list(found.values()))] for name, found in methods.items()]
        made.table([*downs, "MB", "seconds"], rows, len(downs))


def _paid(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Megabytes and seconds, the mean of cells."""
    moved, took = mean([row["bytes"] for row in rows]), mean([row["seconds"] for row in rows])
    return "–" if moved is None else f"{moved / 1e6:.2f}", "–" if took is None else f"{took:.2f}"


def _speed(made: Page, folder: Path, grid: Mapping[str, Any]) -> None:
    found = speeds(folder, grid["rows"])
    if not found:
        return
    target = f"{100 * found['target']:.1f}"
    made.lines += ["", f"### Rounds and bytes to {target}", ""]
    made.lines.append("The target is 90 % of the way from the lowest to the best score of all these runs.")
    rows = []
    for one in found["rows"]:
        there = f"{one['reached']} of {one['runs']}"
        figures = ["–", "–"] if one["rounds"] is None else [f"{one['rounds']:.1f}", f"{one['bytes'] / 1e6:.2f}"]
        rows.append([*one["axes"].values(), there, *figures])
    made.table([*grid["axes"], "runs that reach it", "rounds", "MB"], rows, len(grid["axes"]))
    if stops := sorted({stop for one in found["rows"] for stop in one["after"]}):
        made.lines += ["", "A score that was reached need not last. After so many rounds:"]
        rows = [[*one["axes"].values(), *(score(one["after"].get(stop)) for stop in stops)] for one in found["rows"]]
        made.table([*grid["axes"], *map(str, stops)], rows, len(grid["axes"]))
