"""Hypotheses: the file and what is refused in it, the shipped ones, and the answers to made runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from scipy import stats

from commands import call
from fedmllm.errors import ConfigError
from fedmllm.experiment import sweep
from fedmllm.report.hypotheses import Answer, answers, unknown_cells
from fedmllm.report.hypothesis_file import KINDS, read
from fedmllm.report.writeup import page, read_chapters
from made_runs import make_sweep, replicated, rows_of

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SHIPPED = EXPERIMENTS / "offline" / "hypotheses.toml"

HEAD = 'name = "h"\nclaim = "New is better."\nsource = "ours"\nmargin = { made = 2.0 }\n'
ABOVE = 'above = { axis = "method", higher = ["new"], lower = ["base"] }\n'
ABOVE_REVERSED = 'above = { axis = "method", higher = ["base"], lower = ["new"] }\n'
TREND = 'trend = { axis = "method", higher = ["new"], lower = ["base"], over = "setting", values = [{ easy = 0, hard = 1 }] }\n'
SHARE = 'share = { axis = "method", cell = "new", start = "base", end = "top", at_least = 0.9 }\n'
LOWEST = 'lowest = { axis = "method", cell = "base", others = ["new", "top"] }\n'
ORDER = 'where = { method = ["new"] }\norder = { axis = "setting", ascending = [["hard"], ["easy"]] }\n'


def write(tmp_path: Path, *hypotheses: str) -> Path:
    file = tmp_path / "hypotheses.toml"
    file.write_text("\n".join(f"[[hypotheses]]\n{text}" for text in hypotheses))
    return file


def answer(tmp_path: Path, folder: Path, kind: str) -> Answer:
    (given,) = answers(read(write(tmp_path, HEAD + kind)), read_chapters([folder]))
    return given


# The file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "hypotheses.0.name: this key is required."),
        (HEAD, "hypotheses.0.name = 'h': one key of above, trend, lowest, share, order, trimmed must say what is claimed, and "
               "it has none."),
        (HEAD + ABOVE + LOWEST, "must say what is claimed, and it has above and lowest."),
        (HEAD + ABOVE.replace("above", "abov"), "hypotheses.0.abov: unknown key; did you mean 'above'?"),
        (HEAD + ABOVE.replace("higher", "high"), "hypotheses.0.above.high: unknown key; did you mean 'higher'?"),
        (HEAD + ABOVE.replace('["new"]', '"new"'), "hypotheses.0.above.higher: must be a list, written as [\"new\"]"),
        (HEAD + ABOVE.replace('["new"]', "[]"), "hypotheses.0.above.higher: must not be empty"),
        (HEAD + ABOVE.replace("base", "new"), "hypotheses.0.above: names the cell 'new' 2 times; name each cell once."),
        (HEAD.replace("2.0", "0.0") + ABOVE, "hypotheses.0.margin.made: input should be greater than 0"),
        (HEAD.replace("made = 2.0", "") + ABOVE, "hypotheses.0.margin: must not be empty"),
        (HEAD + 'where = { method = ["new"] }\n' + ABOVE,
         "hypotheses.0.where.method: above names the cells of this axis itself; leave it out."),
        (HEAD + 'where = { setting = ["easy"] }\n' + TREND, "hypotheses.0.where.setting: trend names the cells of this axis"),
        (HEAD + TREND.replace('"setting"', '"method"'),
         "hypotheses.0.trend: over and axis are both 'method'; name the axis along which the difference grows."),
        (HEAD + TREND.replace("hard = 1", "hard = 0"), "hypotheses.0.trend.values: each table needs two cells with different"),
        (HEAD + TREND.replace("}]", "}, { easy = 2, x = 3 }]"), "hypotheses.0.trend: names the cell 'easy' 2 times"),
        (HEAD + ORDER.replace('["hard"], ', ""), "hypotheses.0.order.ascending: needs two groups of cells or more."),
        (HEAD + ORDER.replace('["hard"]', '["hard", "easy"]'), "hypotheses.0.order: names the cell 'easy' 2 times"),
        (HEAD + SHARE.replace("0.9", "1.5"), "hypotheses.0.share.at_least: input should be less than or equal to 1, got 1.5."),
    ],
)  # fmt: skip
def test_a_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(write(tmp_path, text))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_names_are_given_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hypotheses.0 and hypotheses.1 are both named 'h'; rename one\."):
        read(write(tmp_path, HEAD + ABOVE, HEAD + LOWEST))
    refused = call("report", tmp_path, "--hypotheses", tmp_path / "none.toml", "--out", tmp_path / "page.html")
    assert refused.exit_code == 2


# The shipped hypotheses


@cache
def shipped_axes() -> dict[str, dict[str, list[str]]]:
    """sweep -> axis -> cells, of the offline sweeps and studies."""
    files = [file for room in ("offline", "studies") for file in (EXPERIMENTS / room).glob("*.sweep.toml")]
    return {plan.name: {axis.name: [cell.name for cell in axis.cells] for axis in plan.axes} for plan in map(sweep.read, files)}


def test_shipped_hypotheses_are_about_cells_that_exist() -> None:
    for hypothesis in read(SHIPPED):
        for name in hypothesis.margin:
            assert not list(unknown_cells(hypothesis, shipped_axes()[name])), (hypothesis.name, name)


def test_shipped_hypotheses_use_every_kind_of_claim() -> None:
    kinds = {kind for hypothesis in read(SHIPPED) for kind in KINDS if getattr(hypothesis, kind) is not None}
    assert kinds == set(KINDS)


def test_a_claim_of_places_reads_one_method() -> None:
    for hypothesis in read(SHIPPED):
        if hypothesis.axis is None:
            assert [len(cells) for cells in hypothesis.where.values()] == [1]


# Answers to made runs

SHIFTS = {"easy": [1.0, 2.0, 3.0, 2.0], "hard": [3.0, 3.0, 5.0, 5.0]}
METHODS = ("base", "new", "top")


def points_above(place: str, method: str, r: int) -> float:
    return {"base": 0.0, "new": SHIFTS[place][r], "top": 10.0 + r % 2}[method]


def grid(tmp_path: Path, points: Callable[[str, str, int], float] = points_above, **options: object) -> Path:
    """Runs of base, new and top at two settings, four replicates each; `points` are added to the score of a replicate."""
    options = {"methods": METHODS} | options

    def score(place: str, method: str, r: int) -> float:
        return 0.4 + 0.05 * r + 0.1 * (place == "easy") + points(place, method, r) / 100

    return replicated(tmp_path / "grid", score, **options)  # type: ignore[arg-type]


def test_a_cell_is_above_another(tmp_path: Path) -> None:
    given = answer(tmp_path, grid(tmp_path), ABOVE)
    assert given.overall is not None
    assert (given.verdict, given.overall.units, given.overall.worst) == ("supported", 8, pytest.approx(0.01))
    assert given.overall.estimate == pytest.approx(0.03)
    assert given.p_holm == given.judgement.p == given.overall.p
    assert answer(tmp_path, tmp_path / "grid", ABOVE_REVERSED).verdict == "refuted"


def test_an_effect_can_be_supported_and_smaller_than_what_matters(tmp_path: Path) -> None:
    folder = grid(tmp_path)
    (given,) = answers(read(write(tmp_path, HEAD.replace("2.0", "5.0") + ABOVE)), read_chapters([folder]))
    assert given.verdict == "supported, but smaller than ±5"


def test_no_effect_and_no_decision(tmp_path: Path) -> None:
    for scale, verdict in ((1, "no effect larger than ±2"), (20, "undecided")):
        folder = tmp_path / str(scale)
        folder.mkdir()
        grid(folder, lambda place, method, r, scale=scale: scale * (-1) ** r * (method == "new"))  # type: ignore[misc]
        assert answer(tmp_path, folder / "grid", ABOVE).verdict == verdict


def test_a_trend_over_places(tmp_path: Path) -> None:
    given = answer(tmp_path, grid(tmp_path), TREND)
    expected = stats.ttest_ind(SHIFTS["hard"], SHIFTS["easy"], equal_var=False)
    assert given.overall is not None
    assert (given.overall.estimate, given.overall.p) == pytest.approx((0.02, expected.pvalue))


def test_an_order_of_places(tmp_path: Path) -> None:
    given = answer(tmp_path, grid(tmp_path), ORDER)
    new = {place: [5 * r + 10 * (place == "easy") + SHIFTS[place][r] for r in range(4)] for place in SHIFTS}
    expected = stats.ttest_ind(new["easy"], new["hard"], equal_var=False)
    assert given.overall is not None
    assert (given.overall.estimate, given.overall.p) == pytest.approx((0.08, expected.pvalue))
    assert given.overall.units == 8, "the other methods are not read"


def test_the_lowest_of_several_is_decided_by_the_nearest(tmp_path: Path) -> None:
    given = answer(tmp_path, grid(tmp_path), LOWEST)
    assert given.overall is not None
    assert (given.verdict, given.overall.estimate) == ("supported", pytest.approx(0.03))
    assert given.notes == ["decided by new − base."]


def test_a_share_of_the_way(tmp_path: Path) -> None:
    """New is 3 points above base and top 10.5: 6.45 short of 90 %. Without a way there is no share of it."""
    folder = grid(tmp_path)
    given = answer(tmp_path, folder, SHARE)
    assert given.overall is not None
    assert (given.verdict, given.overall.estimate) == ("refuted", pytest.approx(0.03 - 0.9 * 0.105))
    none = answer(tmp_path, folder, SHARE.replace('start = "base", end = "top"', 'start = "top", end = "base"'))
    assert (none.verdict, math.isnan(none.p_holm)) == ("undecided", True)
    assert "the 95 % interval of base − top is not above zero" in none.notes[0]


def test_places_with_the_same_draws_are_one_unit_a_replicate(tmp_path: Path) -> None:
    folder = grid(tmp_path, draws=lambda place, method, r: r, digests=lambda place, r: f"test {r}")
    means = [(a + b) / 2 for a, b in zip(*SHIFTS.values(), strict=True)]
    given = answer(tmp_path, folder, ABOVE)
    assert given.overall is not None
    assert (given.overall.units, given.overall.p) == (4, pytest.approx(stats.ttest_1samp(means, 0).pvalue))
    trend = answer(tmp_path, folder, TREND)
    assert trend.overall is not None
    assert trend.overall.p == pytest.approx(stats.ttest_rel(SHIFTS["hard"], SHIFTS["easy"]).pvalue)


def test_p_is_corrected_over_the_file(tmp_path: Path) -> None:
    folder = grid(tmp_path, lambda place, method, r: (method == "new") * (1.2 + 2 * (-1) ** r))
    texts = [HEAD.replace('"h"', f'"h{i}"') + ABOVE for i in range(3)]
    given = answers(read(write(tmp_path, *texts)), read_chapters([folder]))
    assert [a.p_holm for a in given] == [pytest.approx(3 * given[0].judgement.p)] * 3
    strong = grid(tmp_path / "more", lambda place, method, r: (method == "new") * (2.2 + 2 * (-1) ** r))
    many = answers(read(write(tmp_path, *texts)), read_chapters([strong]))
    assert 0.05 / 3 < many[0].judgement.p < 0.05
    assert [a.verdict for a in many] == ["supported, not after Holm"] * 3


# What is missing is named


def drop(folder: Path, *runs: str) -> Path:
    for run in runs:
        (folder / run / "result.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        (ABOVE.replace("new", "newer"), "the axis 'method' has no cell 'newer'."),
        (ABOVE.replace("method", "methods"), "the sweep has no axis 'methods'."),
        ('where = { setting = ["easy", "odd"] }\n' + ABOVE, "the axis 'setting' has no cell 'odd'."),
        (ABOVE, "missing: easy · new (2 runs), hard · new (1 run)."),
        (LOWEST.replace("new", "none"), "the axis 'method' has no cell 'none'."),
    ],
)
def test_a_claim_about_what_is_missing_is_not_run(tmp_path: Path, kind: str, note: str) -> None:
    given = answer(tmp_path, drop(grid(tmp_path), "new-0-0", "new-0-3", "new-1-2"), kind)
    assert (given.verdict, given.overall, given.notes) == ("not run", None, [note])


def test_what_a_claim_does_not_read_may_be_missing(tmp_path: Path) -> None:
    folder = drop(grid(tmp_path), "top-0-0", "new-1-2")
    assert answer(tmp_path, folder, 'where = { setting = ["easy"] }\n' + ABOVE).judgement.verdict != "not run"


@pytest.mark.parametrize(
    ("points", "replicates", "notes"),
    [
        (lambda place, method, r: math.nan if (method, place) == ("new", "easy") else 0.0, 4,
         ["no replicate with the figures of all cells at easy."]),
        (lambda place, method, r: math.nan if (method, r) == ("new", 1) else r * (method == "new"), 4,
         ["left out: 2 replicates that a cell has no figure for."]),
        (lambda place, method, r: 3.0 * (method == "new"), 4, ["all replicates have the same difference."]),
    ],
)  # fmt: skip
def test_notes_on_replicates(
    tmp_path: Path, points: Callable[[str, str, int], float], replicates: int, notes: Sequence[str]
) -> None:
    assert answer(tmp_path, grid(tmp_path, points, replicates=replicates), ABOVE).notes == notes


def test_an_index_that_lacks_cells_answers_nothing(tmp_path: Path) -> None:
    file = grid(tmp_path) / "sweep.json"
    index = json.loads(file.read_text())
    cells = [cell for cell in index["cells"] if cell["axes"] != {"setting": "hard", "method": "new"}]
    file.write_text(json.dumps(index | {"cells": cells}))
    for kind in (ABOVE, TREND, ORDER):
        assert answer(tmp_path, file.parent, kind).notes == ["the sweep's index lacks some of the cells."]


def test_one_replicate_decides_no_trend(tmp_path: Path) -> None:
    given = answer(tmp_path, grid(tmp_path, replicates=1), TREND)
    assert (given.verdict, given.notes) == ("undecided", ["a test needs two replicates at each place."])


def test_a_test_set_whose_luck_is_unknown_decides_nothing(tmp_path: Path) -> None:
    """All replicates share one test set, and no two resamples of it give each of them a score."""
    folder = grid(tmp_path, digests=lambda place, r: "one test set")
    for file in folder.glob("new-*/result.json"):
        result = json.loads(file.read_text())
        file.write_text(json.dumps(result | {"bootstrap_scores": {"both": [0.5] + [None] * 199}}))
    given = answer(tmp_path, folder, ABOVE)
    assert given.verdict == "undecided"
    assert given.notes == ["fewer than two resamples of the common test set give every replicate a score."]


def test_scores_by_different_metrics_are_refused(tmp_path: Path) -> None:
    folder = grid(tmp_path)
    for run in folder.glob("*-1-*"):
        (run / "result.json").write_text((run / "result.json").read_text().replace("accuracy", "auc"))
    (tmp_path / "page").mkdir()
    done = call("report", folder, "--hypotheses", write(tmp_path, HEAD + ABOVE), "--out", tmp_path / "page" / "x.md")
    assert done.exit_code == 2
    assert "the hypothesis 'h': its cells of made are scored by different metrics" in " ".join(done.output.split())


# The page


def test_the_table_comes_first(tmp_path: Path) -> None:
    folder, hostile = grid(tmp_path), HEAD.replace('"h"', '"a | <b> claim"').replace("made = 2.0", "made = 2.0, other = 1.0")
    file = write(tmp_path, HEAD + ABOVE, hostile + TREND)
    text = "\n".join(page([folder], hypotheses=file).lines)
    head, first, second, third = rows_of(text, "## Hypotheses")
    assert text.index("## Hypotheses") < text.index("## made")
    assert head[:5] == ["hypothesis", "sweep", "verdict", "points [95 %]", "d"]
    assert first[:3] == ["h", "made", "supported"]
    assert first[3].startswith("+3.0 [+")
    assert (first[4], first[-2:]) == ("2", ["+1.0", "8"])
    assert second[0] == "a &#124; &lt;b&gt; claim"
    assert third[1:] == ["other", "not run", "–", "1", "–", "–", "–", "–", "–"]
    assert "supported: 2 (2 after Holm), not run: 1." in text
    assert "other: the sweep is not among the folders of this page." in text
    assert call("report", folder, "--hypotheses", file, "--out", tmp_path / "page.md").exit_code == 0
    assert (tmp_path / "page.md").read_text() == text
    assert "Hypotheses" not in "\n".join(page([folder]).lines)


def test_the_table_comes_first_in_html(tmp_path: Path) -> None:
    """Before the chapter of single runs, too."""
    axes = {"setting": ["easy", "hard"], "method": ["base", "new"]}
    folder = make_sweep(tmp_path / "made", axes, lambda cell, seed, pattern: 0.5 + 0.1 * seed * (cell["method"] == "new"))
    runs = sorted(path.parent for path in folder.glob("*/result.json"))[:1]
    file = write(tmp_path, HEAD + ABOVE)
    assert call("report", folder, *runs, "--hypotheses", file, "--out", tmp_path / "page.html").exit_code == 0
    shown = (tmp_path / "page.html").read_text()
    assert shown.index('id="hypotheses"') < shown.index('id="single-runs"') < shown.index('id="made"')
    assert "h: New is better. (ours)" in shown


def test_claims_whose_names_begin_alike_are_one_item(tmp_path: Path) -> None:
    """A source is named again where it changes."""
    axes = {"setting": ["easy", "hard"], "method": ["base", "new"]}
    folder = make_sweep(tmp_path / "made", axes, lambda cell, seed, pattern: 0.5 + 0.1 * seed * (cell["method"] == "new"))
    kinds = [HEAD.replace('"h"', f'"{name}"') + ABOVE for name in ("gain", "gain, easy", "gain, hard", "loss, early", "loss")]
    file = write(tmp_path, *kinds[:2], kinds[2].replace("ours", "theirs"), *kinds[3:])
    items = [line for line in page([folder], hypotheses=file).lines if "New is better." in line]
    assert items == [
        "- gain: New is better. (ours) gain, easy: New is better. gain, hard: New is better. (theirs)",
        "- loss, early: New is better. (ours) loss: New is better.",
    ]
