"""The sections of a chapter on the page of results; a section without content is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedmllm.report.answers import AnswerCache
from fedmllm.report.convergence import speeds
from fedmllm.report.gap_closed import BASELINES, COMPARED, GapClosed, gaps_by_place, gaps_by_scenario
from fedmllm.report.grids import Cells, Grid, GridRow, place_of, row_score
from fedmllm.report.page import Page
from fedmllm.report.paired_tests import Difference
from fedmllm.report.radar import radar
from fedmllm.report.scores import UNKNOWN, Spread, mean, score
from fedmllm.report.significance import Significance, signed


@dataclass(frozen=True)
class Chapter:
    """A sweep's folder and grid, with the layout that the tables share: the first axis across, the others down."""

    folder: Path
    grid: Grid

    @cached_property
    def answers(self) -> AnswerCache:
        return AnswerCache(self.folder)

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
    grid, columns, methods = chapter.grid, chapter.columns, chapter.methods
    first = next(row for row in grid.rows if row.ids)
    if first.pattern in first.ceiling:
        best = ", ".join(f"{100 * value:.1f} ({name})" for name, value in first.ceiling.items())
        page.lines.append(f"The best that any model can reach is known: {best}.")
    means = {name: [rows[c].spread.mean if c in rows else None for c in columns] for name, rows in methods.items()}
    several = len(columns) > 1
    table = []
    for name, rows in methods.items():
        average = Spread(None if grid.mixed_metrics else mean(means[name]))
        table.append([*name, *(row_score(rows.get(c)) for c in columns), *([score(average)] if several else [])])
    page.table([*chapter.downs, *(c or "score" for c in columns), *(["mean"] if several else [])], table, len(chapter.downs))
    if len(columns) > 2:
        lines = {" · ".join(name): [None if v is None else 100 * v for v in values] for name, values in means.items()}
        picture = f"figures/{grid.name}.svg"
        page.pictures[picture] = radar(f"{grid.name}: {first.metric}, %", columns, lines)
        page.paragraph(f"![{grid.name}: an axis a setting, a line a method]({picture})")


def add_baselines(page: Page, chapter: Chapter) -> None:
    """The best federated method of each place and scenario, between the baselines."""
    places = gaps_by_place(chapter.grid, chapter.answers)
    if not places:
        return
    page.heading(
        "### Between the baselines",
        "The best federated method of each place, chosen by this very score, and its points above the baselines with paired "
        "95 % intervals over the test samples. The share is of the way from zero-shot to centralised.",
    )
    _add_gaps(page, "place", places)
    if scenarios := gaps_by_scenario(chapter.grid, chapter.answers):
        page.paragraph("The same for the mean over the places of a scenario; best is the best by that mean.")
        _add_gaps(page, "scenario", scenarios)


def _add_gaps(page: Page, unit: str, gaps: Sequence[GapClosed]) -> None:
    rows = []
    for gap in gaps:
        scores = [score(Spread(gap.baselines.get(kind))) for kind in BASELINES]
        above = [_points(gap.above.get(kind)) for kind in COMPARED]
        share = UNKNOWN if gap.share is None else f"{100 * gap.share:.0f} %"
        rows.append([gap.label, *scores, gap.best, score(Spread(gap.score)), *above, share])
    page.table([unit, *BASELINES, "best", "its score", *(f"above {kind}" for kind in COMPARED), "share"], rows)
    for kind in COMPARED:
        if tests := [gap.above[kind] for gap in gaps if kind in gap.above]:
            page.paragraph(f"The whole interval is above {kind} in {sum(t.low > 0 for t in tests)} of {len(tests)} {unit}s.")


def _points(test: Difference | None) -> str:
    """ "+3.2 [+1.0, +5.4]", in points."""
    if test is None:
        return UNKNOWN
    return f"{100 * test.difference:+.1f} [{100 * test.low:+.1f}, {100 * test.high:+.1f}]"


def add_significance(page: Page, chapter: Chapter, tests: Significance) -> None:
    """The differences from the baseline at each place, and over all places if there are several."""
    if not tests.comparisons:
        return
    axis = tests.axis
    by_cell = {(c.axes[axis], place_of(c.axes, axis)): signed(c) for c in tests.comparisons}
    places = list(dict.fromkeys(place for _, place in by_cell))
    several = len(places) > 1
    last = " The last columns: over all places of the grid." if several else ""
    page.heading(
        f"### Against {tests.baseline}",
        "Points of difference; p by paired tests, corrected after Holm. A place's p is about other test samples for the same "
        f"seeds: where seeds disagree much, others may say otherwise.{last}",
    )
    rows = []
    for overall in tests.overall:
        row = [overall.name, *(by_cell.get((overall.name, place), UNKNOWN) for place in places)]
        if several:
            row.append(UNKNOWN if chapter.grid.mixed_metrics else signed(overall))
            row.append(f"{overall.better} of {overall.places}")
        rows.append(row)
    general = ["over all", "better in"] if several else []
    page.table([axis, *(" · ".join(place) or "difference" for place in places), *general], rows)


def add_patterns(page: Page, chapter: Chapter) -> None:
    """The scores under each test pattern."""
    names = list(dict.fromkeys(n for rows in chapter.methods.values() for row in rows.values() for n in row.patterns))
    if len(names) < 2:
        return
    page.heading(
        "### Trained in × tested with",
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
    page.table([*chapter.downs, "trained in", *names, "worst tenth"], table, len(chapter.downs) + 1)


def add_transfer(page: Page, chapter: Chapter) -> None:
    """The scores on other tasks' test sets."""
    cells = [(name, column, row) for name, rows in chapter.methods.items() for column, row in rows.items() if row.ids]
    metrics = {task: transferred.metric for _, _, row in cells for task, transferred in row.transfer.items()}
    if not metrics:
        return
    page.heading("### Trained here × tested there", "The final model on the test sets of these tasks.")
    table = []
    for name, column, row in cells:
        spreads = [row.transfer[task].spread if task in row.transfer else None for task in metrics]
        table.append([*name, *([column] if chapter.across else []), *(score(spread, row.missing) for spread in spreads)])
    head = [*chapter.downs, *([chapter.across] if chapter.across else [])]
    page.table([*head, *(f"{task}, {metric}" for task, metric in metrics.items())], table, len(head))


def add_cost(page: Page, chapter: Chapter) -> None:
    """Bytes and seconds per method, or per cell if they depend on the column, as with a rank."""
    page.heading("### Cost", "A run's mean: what travels up and down, and the wall-clock seconds of the machine that made it.")
    methods, downs = chapter.methods, chapter.downs
    transferred = [[row.bytes for row in rows.values() if row.bytes is not None] for rows in methods.values()]
    if any(known and max(known) > 1.01 * min(known) for known in transferred):
        table = [
            [*name, *(" MB, ".join(_cost([rows[c]])) + " s" if c in rows else UNKNOWN for c in chapter.columns)]
            for name, rows in methods.items()
        ]
        page.table([*downs, *chapter.columns], table, len(downs))
    else:
        page.table([*downs, "MB", "seconds"], [[*name, *_cost(list(r.values()))] for name, r in methods.items()], len(downs))


def _cost(rows: Sequence[GridRow]) -> tuple[str, str]:
    """Megabytes and seconds, the mean over cells."""
    transferred, seconds = mean([row.bytes for row in rows]), mean([row.seconds for row in rows])
    return UNKNOWN if transferred is None else f"{transferred / 1e6:.2f}", UNKNOWN if seconds is None else f"{seconds:.2f}"


def add_speed(page: Page, chapter: Chapter) -> None:
    """Rounds and bytes until the target, and the scores on the way there."""
    convergence = speeds(chapter.folder, chapter.grid.rows)
    if convergence is None:
        return
    axes = chapter.grid.axes
    page.heading(
        f"### Rounds and bytes to {100 * convergence.target:.1f}",
        "The target is 90 % of the way from the lowest to the best score of all these runs.",
    )
    table = []
    for speed in convergence.rows:
        rounds = UNKNOWN if speed.rounds is None else f"{speed.rounds:.1f}"
        transferred = UNKNOWN if speed.bytes is None else f"{speed.bytes / 1e6:.2f}"
        table.append([*speed.axes.values(), f"{speed.reached} of {speed.runs}", rounds, transferred])
    page.table([*axes, "runs that reach it", "rounds", "MB"], table, len(axes))
    if stops := sorted({stop for speed in convergence.rows for stop in speed.after}):
        page.paragraph("A score that was reached need not last. After so many rounds:")
        table = [[*speed.axes.values(), *(score(speed.after.get(stop)) for stop in stops)] for speed in convergence.rows]
        page.table([*axes, *map(str, stops)], table, len(axes))
