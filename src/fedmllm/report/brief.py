"""A sweep in as few lines as it takes: its scores, and how far each method is above or below the baseline."""

from __future__ import annotations

import math

from fedmllm.report.comparisons import Comparisons, MethodComparison, conclusions, interval
from fedmllm.report.page import Markdown, Page
from fedmllm.report.sections import Chapter, score_table
from fedmllm.report.sentences import counted, points

HOW = Markdown(
    "The corner of a sweep's table says by which metric, under which test pattern and in how many runs it was scored. † marks "
    "the methods that no other beats. Differences from the baseline are means over all settings with 95 % intervals. In "
    "parentheses is the MDE, the minimum detectable effect, which would be found with a probability of 80 %; where it is above "
    "the planned one, which is the margin that the sweep declares, the s.d. of a replicate's difference and the number of "
    "replicates follow. `fedmllm sweep FILE --only METHOD --only SETTING` repeats the runs of one cell, where FILE is the "
    "sweep file whose `name` is the heading, and `fedmllm compare runs/HEADING` then prints their score. `fedmllm report` "
    "without `--brief` shows everything else."
)


def add_brief(page: Page, chapter: Chapter, corner: str, comparisons: Comparisons | None) -> None:
    """One table, with the differences as its last column. If it has few columns for its rows, they change places."""
    head, *rows = score_table(chapter)
    compared = comparisons is not None and len(comparisons.methods) > 0
    if comparisons and compared and chapter.downs == [comparisons.axis]:
        planned = "" if comparisons.margin is None else f", planned {100 * comparisons.margin:g}"
        head.append(f"above {comparisons.baseline} (MDE{planned})")
        differences = {method.name: _difference(method, comparisons.margin) for method in comparisons.methods}
        for row in rows:
            row.append(differences.get(row[0], ""))
            row[0] += " †" if row[0] in comparisons.not_beaten else ""
        compared = False
    if len(chapter.downs) == 1 and len(rows) >= 2 * len(chapter.columns):
        head, *rows = map(list, zip(head, *rows, strict=True))
    page.table([corner, *[""] * (len(chapter.downs) - 1), *head[len(chapter.downs) :]], rows, len(chapter.downs))
    if comparisons and compared:  # with several axes below each other, or methods across
        page.paragraph(" ".join(conclusions(comparisons)))


def _difference(method: MethodComparison, planned: float | None) -> str:
    """ "+0.5 [-3.0, +3.9] (4.4)", with "(4.4: s.d. 5.0, 15 replicates)" if less was planned."""
    overall = method.overall
    if math.isnan(overall.mde):
        return interval(overall)
    missed = planned is not None and round(overall.mde, 3) > planned  # to a tenth of a point, as printed
    why = f": s.d. {points(overall.sd, '')}, {counted(overall.units, 'replicate')}" if missed else ""
    return f"{interval(overall)} ({points(overall.mde, '')}{why})"
