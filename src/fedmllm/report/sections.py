"""The sections of a chapter on the page of results; a section without content is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedmllm.report.best import Best
from fedmllm.report.comparisons import HEAD, Comparisons, comparable, conclusions, figures, interval
from fedmllm.report.gap_closed import BASELINES, COMPARED, GapClosed, gaps_by_place, gaps_by_scenario
from fedmllm.report.grids import Cells, Grid, GridRow, row_score
from fedmllm.report.page import Markdown, Page
from fedmllm.report.radar import radar
from fedmllm.report.scores import UNKNOWN, Spread, mean, score
from fedmllm.report.sentences import points
from fedmllm.report.units import UnitReader


@dataclass(frozen=True)
class Chapter:
    """A sweep's folder and grid, with the layout that the tables share: the first axis across, the others down."""

    folder: Path
    grid: Grid

    @cached_property
    def reader(self) -> UnitReader:
        return UnitReader(self.folder)

    @property
    def across(self) -> str:
        """The axis of the columns; empty if the grid has one axis, which then goes down."""
        return self.grid.axes[0] if len(self.grid.axes) > 1 else ""

    @property
    def downs(self) -> list[str]:
        return [axis for axis in self.grid.axes if axis != self.across]

    @cached_property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(row.axes.get(self.across, "") for row in self.grid.rows))

    @cached_property
    def methods(self) -> Cells:
        return self.grid.cells(self.downs, self.across)


def add_scores(page: Page, chapter: Chapter) -> None:
    """The table of scores, and a radar chart of three columns or more."""
    grid, columns = chapter.grid, chapter.columns
    first = next(row for row in grid.rows if row.ids)
    if first.pattern in first.ceiling:
        best = ", ".join(f"{100 * value:.1f} ({name})" for name, value in first.ceiling.items())
        page.continued(f"The best that any model can reach is known: {best}.")
    head, *table = score_table(chapter)
    page.table(head, table, len(chapter.downs), shade="heat")
    if len(columns) > 2:
        means = {name: _means(chapter, rows) for name, rows in chapter.methods.items()}
        lines = {" · ".join(name): [None if v is None else 100 * v for v in values] for name, values in means.items()}
        picture = radar(f"{grid.name}: {first.metric}, %", columns, lines)
        page.picture(f"{grid.name}: an axis a setting, a line a method", f"figures/{grid.name}.svg", picture)


def score_table(chapter: Chapter) -> list[list[str]]:
    """The head and the rows of the table of scores, with the mean over the columns if there are several. Where tasks are scored
    by macro-F1, which swings with the rarest label, the mean accuracy is told as well."""
    columns = chapter.columns
    several, f1 = len(columns) > 1, {row.metric for row in chapter.grid.rows if row.ids} == {"macro_f1"}
    more = [*(["mean"] if several else []), *(["accuracy"] if f1 else [])]
    table = [[*chapter.downs, *(column or "score" for column in columns), *more]]
    for name, rows in chapter.methods.items():
        average = Spread(None if chapter.grid.mixed_metrics else mean(_means(chapter, rows)))
        accuracy = Spread(mean([rows[column].accuracy.mean if column in rows else None for column in columns]))
        means = [*([score(average)] if several else []), *([score(accuracy)] if f1 else [])]
        table.append([*name, *(row_score(rows.get(column)) for column in columns), *means])
    return table


def _means(chapter: Chapter, rows: Mapping[str, GridRow]) -> list[float | None]:
    return [rows[column].spread.mean if column in rows else None for column in chapter.columns]


def add_baselines(page: Page, chapter: Chapter) -> None:
    """The best federated method of each place and scenario, between the baselines."""
    places = gaps_by_place(chapter.grid, chapter.reader)
    if not places:
        return
    page.heading(
        3,
        "Between the baselines",
        "The federated methods that no other beats (paired one-sided tests, 5 % in all), and the one with the best mean. Its "
        "score and its points above the baselines are cross-fitted: it is chosen on the other replicates and read on the one "
        "left out. Intervals hold for all methods together. The share is of the way from zero-shot to centralised.",
    )
    _add_gaps(page, "place", places)
    if scenarios := gaps_by_scenario(chapter.grid, chapter.reader):
        page.paragraph("The same over the places of a scenario.")
        _add_gaps(page, "scenario", scenarios)


def _add_gaps(page: Page, unit: str, gaps: Sequence[GapClosed]) -> None:
    rows = []
    for gap in gaps:
        baselines = [score(Spread(gap.baselines.get(kind))) for kind in BASELINES]
        above = [_lead(gap.above.get(kind)) for kind in COMPARED]
        share = UNKNOWN if gap.share is None else f"{100 * gap.share:.0f} %"
        best = [gap.best.method, score(Spread.of([gap.best.score]))]
        rows.append([gap.label, *baselines, ", ".join(gap.candidates), *best, *above, share])
    head = [unit, *BASELINES, "not beaten", "best", "its score", *(f"above {kind}" for kind in COMPARED), "share"]
    page.table(head, rows)


def _lead(lead: Best | None) -> str:
    """ "+3.2 [+1.0, +5.4]", in points."""
    if lead is None:
        return UNKNOWN
    return points(lead.score) + ("" if math.isnan(lead.low) else f" [{points(lead.low)}, {points(lead.high)}]")


HOW = (
    "Points of difference with 95 % intervals over replicates; p corrected after Holm. MDE is the minimum detectable effect, "
    "which would be found with a probability of 80 %; anything beyond the next column is excluded (two one-sided tests, 5 %); "
    "then the worst replicate. [How this is done](statistics.md)."
)
SHARED = (
    "These runs share their seeds and test samples over the places, so a unit is a seed averaged over the places, and the test "
    "set's own luck is part of every interval."
)


def add_comparisons(page: Page, chapter: Chapter, comparisons: Comparisons) -> None:
    """The methods against the baseline over all places, what follows from it in sentences, and the single places."""
    if not comparisons.methods:
        return
    page.heading(
        3,
        f"Against {comparisons.baseline}",
        Markdown(f"{HOW} {SHARED}" if comparisons.shared else HOW),
    )
    if (
        not comparisons.shared
        and len(comparisons.places) > 1
        and all(comparable(chapter.grid, axis) for axis in chapter.grid.axes if axis != comparisons.axis)
    ):
        page.paragraph("These settings have the same draws, so a unit is a replicate averaged over them.")
    page.table([comparisons.axis, *HEAD], [[method.name, *figures(method)] for method in comparisons.methods])
    page.items(conclusions(comparisons))
    if len(comparisons.places) > 1:
        page.paragraph("At each place, an interval and no test:")
        rows = []
        for place in comparisons.places:
            at = [method.by_place.get(place) for method in comparisons.methods]
            rows.append([place, *(interval(comparison) if comparison else UNKNOWN for comparison in at)])
        page.table(["place", *(method.name for method in comparisons.methods)], rows)


def add_patterns(page: Page, chapter: Chapter) -> None:
    """The scores under each test pattern."""
    names = list(dict.fromkeys(n for rows in chapter.methods.values() for row in rows.values() for n in row.patterns))
    if len(names) < 2:
        return
    page.heading(
        3,
        "Trained in × tested with",
        "Test questions with both modalities or one alone; the last column is what the worst tenth of clients can expect.",
    )
    table = []
    for name, rows in chapter.methods.items():
        trained = {column: rows[column] for column in chapter.columns if column in rows and rows[column].ids}
        if len(trained) > 1 and len({tuple(row.ids) for row in trained.values()}) == 1:  # one run under several names
            trained = {"any": next(iter(trained.values()))}
        for column, row in trained.items():
            spreads = (*(row.patterns.get(pattern) for pattern in names), row.worst_decile)
            table.append([*name, column, *(score(spread, row.missing) for spread in spreads)])
    page.table([*chapter.downs, "trained in", *names, "worst tenth"], table, len(chapter.downs) + 1, shade="heat")


def add_transfer(page: Page, chapter: Chapter) -> None:
    """The scores on other tasks' test sets."""
    cells = [(name, column, row) for name, rows in chapter.methods.items() for column, row in rows.items() if row.ids]
    metrics = {task: transferred.metric for _, _, row in cells for task, transferred in row.transfer.items()}
    if not metrics:
        return
    page.heading(3, "Trained here × tested there", "The final model on the test sets of these tasks.")
    table = []
    for name, column, row in cells:
        spreads = [row.transfer[task].spread if task in row.transfer else None for task in metrics]
        table.append([*name, *([column] if chapter.across else []), *(score(spread, row.missing) for spread in spreads)])
    head = [*chapter.downs, *([chapter.across] if chapter.across else [])]
    page.table([*head, *(f"{task}, {metric}" for task, metric in metrics.items())], table, len(head), shade="heat")


def add_cost(page: Page, chapter: Chapter) -> None:
    """Bytes and seconds per method, or per cell if they depend on the column, as with a rank."""
    methods, downs = chapter.methods, chapter.downs
    timed = any(row.simulated_seconds is not None for row in chapter.grid.rows)
    clock = " Simulated seconds are those of the virtual clock when the last round ended." if timed else ""
    what = "A run's mean: what travels up and down, and the wall-clock seconds of the machine that made it."
    page.heading(3, "Cost", what + clock)
    transferred = [[row.bytes for row in rows.values() if row.bytes is not None] for rows in methods.values()]
    if any(known and max(known) > 1.01 * min(known) for known in transferred):
        table = [
            [*name, *(_cost_of_cell(rows[c], timed) if c in rows else UNKNOWN for c in chapter.columns)]
            for name, rows in methods.items()
        ]
        page.table([*downs, *chapter.columns], table, len(downs))
    else:
        head = [*downs, "MB", "seconds", *(["simulated seconds"] if timed else [])]
        page.table(head, [[*name, *_cost(list(r.values()), timed)] for name, r in methods.items()], len(downs), "bars")
    _add_parts(page, chapter)


def _add_parts(page: Page, chapter: Chapter) -> None:
    """Bytes by part of the model, where more than the text model is trained."""
    rows = [(name, list(cells.values())) for name, cells in chapter.methods.items()]
    parts = dict.fromkeys(part for _, cells in rows for cell in cells for part in cell.bytes_by_part)
    if parts.keys() <= {"text", "other"}:
        return
    page.paragraph("The megabytes by the part of the model that their tensors belong to:")
    table = []
    for name, cells in rows:
        means = (mean([cell.bytes_by_part.get(part, 0.0) for cell in cells if cell.bytes_by_part]) for part in parts)
        table.append([*name, *(UNKNOWN if value is None else f"{value / 1e6:.2f}" for value in means)])
    page.table([*chapter.downs, *parts], table, len(chapter.downs))


def _cost(rows: Sequence[GridRow], timed: bool) -> list[str]:
    """Megabytes, seconds and, if `timed`, simulated seconds, the mean over cells."""
    transferred, seconds = mean([row.bytes for row in rows]), mean([row.seconds for row in rows])
    simulated = mean([row.simulated_seconds for row in rows])
    figures = [UNKNOWN if transferred is None else f"{transferred / 1e6:.2f}", UNKNOWN if seconds is None else f"{seconds:.2f}"]
    return figures + ([UNKNOWN if simulated is None else f"{simulated:.1f}"] if timed else [])


def _cost_of_cell(row: GridRow, timed: bool) -> str:
    """ "0.05 MB, 12.00 s", and ", 1234.5 simulated s" if `timed`."""
    return ", ".join(f"{figure} {unit}" for figure, unit in zip(_cost([row], timed), ("MB", "s", "simulated s"), strict=False))
