"""The answers to a file of hypotheses: a verdict on each claim for each sweep that it is about."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from fedmllm.errors import RunError
from fedmllm.report.comparisons import interval
from fedmllm.report.contrasts import Judgement, Verdict, estimate, judge
from fedmllm.report.forest import Effect, forest
from fedmllm.report.grids import Grid, GridRow
from fedmllm.report.hypothesis_file import Hypothesis, Place, Share, Trimmed, read
from fedmllm.report.kept import trimmed_more
from fedmllm.report.page import Markdown, Page
from fedmllm.report.protocol import LEVEL, Comparison, holm
from fedmllm.report.scores import UNKNOWN
from fedmllm.report.sections import Chapter
from fedmllm.report.sentences import counted, points, why_untested


@dataclass(frozen=True)
class Answer:
    """The verdict on a hypothesis for one sweep. `overall` is the contrast that decides it, None if runs are missing; `notes`
    say what is missing and what a reader should know of the replicates."""

    hypothesis: Hypothesis
    sweep: str
    judgement: Judgement
    overall: Comparison | None = None
    notes: Sequence[str] = ()
    p_holm: float = math.nan

    @property
    def margin(self) -> float:
        return self.hypothesis.margin[self.sweep]

    @property
    def decided(self) -> bool:
        return self.judgement.verdict in ("supported", "refuted")

    @property
    def firm(self) -> bool:
        """Whether the verdict holds after Holm's correction; one that rejects nothing needs none."""
        return not self.decided or self.p_holm < LEVEL

    @property
    def verdict(self) -> str:
        """As a page prints it."""
        margin, verdict = f"±{self.margin:g}", self.judgement.verdict
        if verdict == "no effect":
            return f"no effect larger than {margin}"
        small = f", but smaller than {margin}" if self.decided and self.judgement.small else ""
        return verdict + small + ("" if self.firm else ", not after Holm")


def answers(hypotheses: Sequence[Hypothesis], chapters: Sequence[Chapter]) -> list[Answer]:
    """One per hypothesis and sweep, with p corrected for the number of all of them. Raises RunError as `UnitReader` does."""
    known = {chapter.grid.name: chapter for chapter in chapters}
    given = []
    for hypothesis in hypotheses:
        for sweep in hypothesis.margin:
            if sweep in known:
                given.append(_answer(hypothesis, sweep, known[sweep]))
            else:
                given.append(_not_run(hypothesis, sweep, "the sweep is not among the folders of this page"))
    corrected = holm([answer.judgement.p for answer in given])
    return [replace(answer, p_holm=p) for answer, p in zip(given, corrected, strict=True)]


def _not_run(hypothesis: Hypothesis, sweep: str, *missing: str) -> Answer:
    return Answer(hypothesis, sweep, Judgement("not run", math.nan, 0, False), notes=[f"{'; '.join(missing)}."])


def _answer(hypothesis: Hypothesis, sweep: str, chapter: Chapter) -> Answer:
    """Every run that the hypothesis reads must be complete: it was declared for all of them."""
    axes = {axis: chapter.grid.cells_of(axis) for axis in chapter.grid.axes}
    rows, missing = _selected(hypothesis, chapter.grid), list(unknown_cells(hypothesis, axes))
    if missing or (missing := _incomplete(rows)):
        return _not_run(hypothesis, sweep, *missing)
    if len(rows) != math.prod(len(set(hypothesis.selected.get(axis, cells))) for axis, cells in axes.items()):
        return _not_run(hypothesis, sweep, "the sweep's index lacks some of the cells")
    if len({row.metric for row in rows}) > 1:
        raise RunError(
            f"the hypothesis {hypothesis.name!r}: its cells of {sweep} are scored by different metrics, which have no common "
            "mean; select those of one metric with `where`."
        )
    return _decided(hypothesis, sweep, chapter, rows)


def _decided(hypothesis: Hypothesis, sweep: str, chapter: Chapter, rows: Sequence[GridRow]) -> Answer:
    """The answer from complete rows, all cells at all places."""
    places: dict[str, Place] = {}
    by_cell: dict[str, dict[str, GridRow]] = {}
    for row in rows:
        others = {axis: cell for axis, cell in row.axes.items() if axis != hypothesis.axis}
        place = " · ".join(others.values())
        places[place] = others
        by_cell.setdefault(row.axes.get(hypothesis.axis or "", ""), {})[place] = row
    matched, contrast = chapter.reader.by_place(by_cell), hypothesis.contrast
    scored = (matched.scores, matched.resamples, matched.averaged)
    if isinstance(contrast, Trimmed):
        kept = {cell: {place: trimmed_more(chapter, row) for place, row in at.items()} for cell, at in by_cell.items()}
        scored = (kept, None, matched.averaged)  # updates are no answers to test questions, which could be resampled
    contrasts = contrast.contrasts(places)
    overall = [estimate(wanted, *scored) for wanted in contrasts]
    if lost := [place for comparison in overall for place in comparison.lost]:
        return _not_run(hypothesis, sweep, f"no replicate with the figures of all cells at {', '.join(dict.fromkeys(lost))}")
    judgement = judge(overall, hypothesis.margin[sweep] / 100)
    weakest = overall[judgement.weakest]
    notes = [f"decided by {contrasts[judgement.weakest].label}."] if len(contrasts) > 1 else []
    if isinstance(contrast, Share) and not estimate(way := contrast.way(places), *scored).low > 0:
        judgement = Judgement("undecided", math.nan, 0, False)
        notes.append(f"the 95 % interval of {way.label} is not above zero, so that there is no way to have a share of.")
    elif math.isnan(judgement.p):
        notes.append(f"{why_untested(weakest)}.")
    if weakest.dropped:
        notes.append(f"left out: {counted(weakest.dropped, 'replicate')} that a cell has no figure for.")
    return Answer(hypothesis, sweep, judgement, weakest, notes)


def unknown_cells(hypothesis: Hypothesis, axes: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What the hypothesis reads and a sweep with these cells on its axes does not have."""
    for axis, cells in hypothesis.selected.items():
        if axis not in axes:
            yield f"the sweep has no axis {axis!r}"
        elif absent := [cell for cell in cells if cell not in axes[axis]]:
            yield f"the axis {axis!r} has no cell {', '.join(map(repr, absent))}"


def _selected(hypothesis: Hypothesis, grid: Grid) -> list[GridRow]:
    selected = hypothesis.selected.items()
    return [row for row in grid.rows if all(row.axes.get(axis) in cells for axis, cells in selected)]


def _incomplete(rows: Sequence[GridRow]) -> list[str]:
    cells = [f"{' · '.join(row.axes.values())} ({counted(row.missing, 'run')})" for row in rows if row.missing]
    return [f"missing: {', '.join(cells[:5])}{f' and {len(cells) - 5} more cells' if len(cells) > 5 else ''}"] if cells else []


HOW = Markdown(
    "Each claim was declared in a file with the cells that it is about and the margin d, in points, below which an effect does "
    "not matter. Supported: the 95 % interval is on the claimed side of zero; refuted: on the other; no effect: two one-sided "
    "tests (5 %) exclude more than ±d. p is corrected after Holm over all rows of the table. MDE is the minimum detectable "
    "effect, which would be found with a probability of 80 %; where it is above d, there are too few replicates for their s.d. "
    "`worst` is the effect in the worst replicate, and `units` is the number of independent replicates. Of a share of the way "
    "between two baselines, the points are how far the score is above that share; where updates are trimmed, they are how much "
    "less is kept of those of clients with one modality. [How this is done](statistics.md#hypotheses)."
)
HEAD = ("hypothesis", "sweep", "verdict", "points [95 %]", "d", "p (Holm)", "MDE", "s.d.", "worst", "units")


def add_hypotheses(page: Page, file: Path, chapters: Sequence[Chapter]) -> None:
    """The table of verdicts, and what each hypothesis claims. Raises ConfigError if the file is wrong, RunError if the runs
    cannot be compared."""
    given = answers(read(file), chapters)
    page.heading(2, "Hypotheses", HOW)
    page.paragraph(_counts(given))
    title = "The claims, each with its effect in every sweep that it is about"
    page.picture(f"{title}: the table below as a picture", "figures/hypotheses.svg", forest(title, [*map(_effect, given)]))
    page.table(HEAD, [_row(answer) for answer in given], 3)
    by_kind: dict[str, dict[str, list[Answer]]] = {}
    for answer in given:
        name = answer.hypothesis.name
        by_kind.setdefault(name.partition(", ")[0], {}).setdefault(name, []).append(answer)
    page.items([_claims(by_name) for by_name in by_kind.values()])


def _counts(given: Sequence[Answer]) -> str:
    """ "supported: 3 (2 after Holm), undecided: 1." """
    counts = Counter(answer.judgement.verdict for answer in given)
    firm = Counter(answer.judgement.verdict for answer in given if answer.decided and answer.firm)
    after = {verdict: f" ({firm[verdict]} after Holm)" for verdict in ("supported", "refuted")}
    shown = [f"{verdict}: {counts[verdict]}{after.get(verdict, '')}" for verdict in get_args(Verdict) if verdict in counts]
    return f"{', '.join(shown)}."


def _effect(answer: Answer) -> Effect:
    """As the picture shows it."""
    overall = answer.overall
    shares = (overall.estimate, overall.low, overall.high) if overall else (math.nan,) * 3
    estimate, low, high = (100 * share for share in shares)
    return Effect(
        answer.hypothesis.name, answer.sweep, estimate, low, high, answer.margin, answer.judgement.verdict, answer.firm
    )


def _row(answer: Answer) -> list[str]:
    named = [answer.hypothesis.name, answer.sweep, answer.verdict]
    overall, p = answer.overall, answer.p_holm
    if overall is None:
        return [*named, UNKNOWN, f"{answer.margin:g}", *[UNKNOWN] * 5]
    shown = UNKNOWN if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
    figures = [points(overall.mde, ""), points(overall.sd, ""), points(overall.worst), str(overall.units)]
    return [*named, interval(overall), f"{answer.margin:g}", shown, *figures]


def _claims(by_name: Mapping[str, Sequence[Answer]]) -> str:
    """Claims with names alike up to the first comma, each with its notes; a source is named again only where it changes."""
    said, source = [], ""
    for name, of_one in by_name.items():
        hypothesis = of_one[0].hypothesis
        said.append(f"{name}: {hypothesis.claim}")
        if hypothesis.source != source:
            source = hypothesis.source
            said.append(f"({source})")
        said += [f"{answer.sweep}: {' '.join(answer.notes)}" for answer in of_one if answer.notes]
    return " ".join(said)
