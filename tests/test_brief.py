"""`fedmllm report --brief`: one table a sweep, the picture of the hypotheses, and how many lines a whole page takes."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import pytest

from commands import call
from fedmllm.report.forest import COLOURS, PLOT, Effect, forest
from fedmllm.report.writeup import page
from made_runs import replicated, rows_of

FILE = '[[hypotheses]]\nname = "h"\nclaim = "New is better."\nsource = "ours"\nmargin = { made = 2.0 }\n' + (
    'above = { axis = "method", higher = ["new"], lower = ["base"] }\n'
)


def scores(place: str, method: str, r: int) -> float:
    """New is 3 points above base, give or take 1; other has the same scores as base, give or take 4."""
    return 0.5 + 0.05 * r + (0.03 + 0.01 * (-1) ** r) * (method == "new") + 0.04 * (-1) ** r * (method == "other")


def brief(*folders: Path, hypotheses: Path | None = None) -> str:
    return "\n".join(page(folders, hypotheses=hypotheses, brief=True).lines)


def test_a_sweep_is_one_table_with_its_differences(tmp_path: Path) -> None:
    folder = replicated(tmp_path / "grid", scores, methods=("base", "new", "other"), margin=2.0)
    text = brief(folder)
    head, base, new, other = rows_of(text, "## made")
    assert head == ["accuracy, pattern `both`, 24 runs", "easy", "hard", "mean", "above base (MDE, planned 2)"]
    assert base == ["base", "57.5 ± 6.5", "57.5 ± 6.5", "57.5", ""]
    assert new[:1] == ["new †"], "no other beats it, and it beats base"
    # The differences are 4, 2, 4, 2 at both places: s.d. 1.15, s.e. 1.15 / √8, and t for six degrees of freedom.
    assert new[-1] == "+3.0 [+2.0, +4.0] (1.4)"
    assert other[-1].startswith("+0.0 [")
    assert other[-1].endswith(": s.d. 4.6, 8 replicates)"), "the planned 2 points would not be found"
    assert "\n\n## made\n| accuracy" in text, "a line a sweep counts"
    assert not [line for line in text.splitlines() if line.startswith("###")]
    assert page([folder], brief=True).pictures == {}


def test_few_settings_go_down_and_many_methods_across(tmp_path: Path) -> None:
    methods = ("base", *(f"m{i}" for i in range(5)))
    head, easy, hard, mean, above = rows_of(brief(replicated(tmp_path / "grid", scores, methods=methods)), "## made")
    assert [name.removesuffix(" †") for name in head] == ["accuracy, pattern `both`, 48 runs", *methods]
    assert (easy[0], hard[0], mean[0], above[0]) == ("easy", "hard", "mean", "above base (MDE)")
    assert mean[1:] == ["57.5"] * 6
    assert above[1:] == ["", *["+0.0"] * 5], "differences without any spread have no interval"


def test_beside_macro_f1_stands_the_mean_accuracy(tmp_path: Path) -> None:
    folder = replicated(tmp_path / "grid", scores)
    for file in folder.glob("*/result.json"):
        result = json.loads(file.read_text())
        both = result["metrics"]["both"]
        both["macro_f1"] = both["accuracy"] / 2
        file.write_text(json.dumps(result | {"primary_metric": "macro_f1"}))
    head, base, new = rows_of(brief(folder), "## made")
    assert head[-3:] == ["mean", "accuracy", "above base (MDE)"]
    assert base[-3:-1] == ["28.7", "57.5"]
    assert new[-3:-1] == ["30.2", "60.5"]


def test_methods_across_are_told_of_in_a_sentence(tmp_path: Path) -> None:
    folder = replicated(tmp_path / "grid", scores)
    index = json.loads((folder / "sweep.json").read_text())
    for cell in index["cells"]:
        cell["axes"] = {"method": cell["axes"]["method"], "setting": cell["axes"]["setting"]}
    (folder / "sweep.json").write_text(json.dumps(index | {"axes": ["method", "setting"]}))
    text = brief(folder)
    assert rows_of(text, "## made")[0] == ["accuracy, pattern `both`, 16 runs", "base", "new", "mean"]
    assert "new is above base by 3.0 points [2.0, 4.0] over 2 settings, 8 replicates" in text


def test_it_is_for_markdown(tmp_path: Path) -> None:
    refused = call("report", tmp_path, "--brief", "--out", tmp_path / "page.html")
    assert refused.exit_code == 2
    assert "--brief is for a page in Markdown; give --out a name that ends in .md." in " ".join(refused.stderr.split())


def test_the_page_of_this_repository_is_short() -> None:
    docs = Path(__file__).parents[1] / "docs"
    text = (docs / "results.md").read_text()
    assert len(text.splitlines()) <= 300
    assert "![" in text.partition("| hypothesis |")[0]
    ElementTree.parse(docs / "figures" / "hypotheses.svg")


# The forest plot

EFFECTS = [
    Effect("a claim & more", "one", 5.0, 2.0, 8.0, 2.0, "supported", True),
    Effect("a claim & more", "two", -7.0, -45.0, 31.0, 2.0, "undecided", True),
    Effect("another claim with a name that takes up more than one line", "one", -4.0, -5.0, -3.0, 2.0, "refuted", False),
    Effect("unknown", "one", math.nan, math.nan, math.nan, 1.0, "not run", True),
]


def test_a_forest_plot_by_hand() -> None:
    root = ElementTree.fromstring(forest("t < u", EFFECTS))
    assert root.findtext("{*}title") == "t < u"
    first, second, third = root.findall("{*}circle")
    zero = float(root.findall("{*}line")[0].get("x1", ""))
    point = PLOT / 20  # the scale goes to ±10, since the farthest estimate is at −7
    assert float(first.get("cx", "")) == pytest.approx(zero + 5 * point, abs=0.1)
    assert float(third.get("cx", "")) == pytest.approx(zero - 4 * point, abs=0.1)
    assert [c.get("fill") for c in (first, second, third)] == [COLOURS["supported"], COLOURS["undecided"], "white"]
    _, interval, wide, _ = root.findall("{*}line")
    assert float(interval.get("x2", "")) - float(interval.get("x1", "")) == pytest.approx(6 * point, abs=0.2)
    assert (float(wide.get("x1", "")), float(wide.get("x2", ""))) == pytest.approx((zero - PLOT / 2, zero + PLOT / 2), abs=0.1)
    assert len(root.findall("{*}polygon")) == 2, "an arrow at each end that is cut"
    bands = [float(rect.get("width", "0")) for rect in root.findall("{*}rect")[1:]]
    assert bands == pytest.approx([4 * point] * 3 + [2 * point], abs=0.1)


def test_its_texts_fit() -> None:
    far = EFFECTS[0]._replace(estimate=-230.0, where="a sweep with a rather long name")
    for effects in (EFFECTS, [far, *EFFECTS], [EFFECTS[3]]):
        root = ElementTree.fromstring(forest("The effects", effects))
        _, _, width, height = map(float, root.get("viewBox", "").split())
        texts = [t for t in root.findall("{*}text") if t.text]
        for text in texts:
            x, length = float(text.get("x", "")), 6.5 * len(text.text or "")
            left = {"end": x - length, "middle": x - length / 2}.get(text.get("text-anchor", ""), x)
            assert 0 <= left <= left + length <= width, text.text
            assert 0 < float(text.get("y", "")) < height
        assert {effect.verdict for effect in effects} <= {t.text for t in texts}
        ticks = [float(t.get("x", "")) for t in texts if t.get("text-anchor") == "middle"]
        assert min(b - a for a, b in zip(ticks[::2], ticks[2::2], strict=False)) > 25


def test_a_forest_plot_needs_an_effect() -> None:
    empty: Sequence[Effect] = []
    with pytest.raises(ValueError, match="needs an effect"):
        forest("", empty)
