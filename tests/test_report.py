"""`fedmllm report` on hand-made sweep folders: its tables and sentences, its determinism, and the folders it rejects."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path

import pytest

from commands import call
from fedmllm.report.grids import read_grid
from fedmllm.report.radar import radar, scale
from fedmllm.report.writeup import choose_baseline, page
from made_runs import make_run, make_sweep, rows_of

AXES = {"setting": ["α = 5", "β = 0.3", "I:T = 3:7", "p < 1"], "method": ["zero-shot", "local", "FedAvg", "Broken"]}
SHARES = {"zero-shot": 0.5, "local": 0.6, "FedAvg": 0.9, "Broken": 0.3}
KINDS = {"zero-shot": "zero-shot", "local": "local"}


def hits(cell: Mapping[str, str], seed: int, pattern: str) -> float:
    share = SHARES[cell["method"]]
    trained = cell["method"] in ("FedAvg", "Broken")
    return share + (0.05 * seed if trained else 0) - (0.1 if pattern != "both" else 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_sweep(tmp_path / "grid", AXES, hits, kinds=KINDS)


def test_the_page_shows_the_results_of_the_runs(folder: Path, tmp_path: Path) -> None:
    done = call("report", folder, "--out", tmp_path / "docs" / "results.md")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "docs" / "results.md").read_text()
    head, *rows = rows_of(text, "## made")
    assert head == ["method", *AXES["setting"], "mean"]
    assert [row[0] for row in rows] == AXES["method"]
    # FedAvg answers 36 and 38 of 40 correctly: 90 and 95, mean 92.5, s.d. 3.54. Zero-shot is one run and has no s.d.
    assert rows[2][1:] == ["92.5 ± 3.5"] * 4 + ["92.5"]
    assert rows[0][1:] == ["50.0"] * 5
    head, *rows = rows_of(text, "### Against zero-shot")
    assert head == ["method", "mean", "points above", "p (Holm)", "MDE", "not larger than ±", "worst", "units"]
    compared = {row[0]: row[1:] for row in rows}
    assert (compared["FedAvg"][0], compared["FedAvg"][1][:7], compared["FedAvg"][5:]) == ("92.5", "+42.5 [", ["+40.0", "2"])
    assert compared["Broken"][1].startswith("-17.5 [")
    assert "These runs share their seeds and test samples over the places" in text
    at_places = rows_of(text, "At each place, an interval and no test")
    assert at_places[0] == ["place", "local", "FedAvg", "Broken"]
    assert [row[2][:7] for row in at_places[1:]] == ["+42.5 ["] * 4
    patterns = rows_of(text, "### Trained in × tested with")
    assert ["FedAvg", "p < 1", "92.5 ± 3.5", "82.5 ± 3.5", "82.5 ± 3.5", "40.0"] in [
        [*r[:5], r[5].split(" ")[0]] for r in patterns
    ]
    # The untrained model is the same whatever the clients hold, so it has one row.
    assert [row[1] for row in patterns if row[0] == "zero-shot"] == ["any"]
    assert ["FedAvg", "0.00", "12.00"] in rows_of(text, "### Cost")
    assert "- FedAvg is above zero-shot by 42.5 points [" in text
    assert "figures/made.svg" in text


@pytest.mark.parametrize(
    ("name", "heading"), [("page.md", "# Studies &#124; 2026\n"), ("page.html", "<h1>Studies | 2026</h1>")]
)
def test_a_page_has_the_heading_that_it_is_given(folder: Path, tmp_path: Path, name: str, heading: str) -> None:
    call("report", folder, "--title", "Studies | 2026", "--out", tmp_path / name)
    assert heading in (tmp_path / name).read_text(encoding="utf-8")


def test_costs_that_depend_on_the_setting_are_listed_per_setting(folder: Path) -> None:
    for cell in json.loads((folder / "sweep.json").read_text())["cells"]:
        if cell["axes"] == {"setting": "β = 0.3", "method": "FedAvg"}:
            file = folder / cell["id"] / "result.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"bytes_up": {"adapter": 3_000_000}}))
    head, *rows = rows_of("\n".join(page([folder]).lines), "### Cost")
    assert head == ["method", *AXES["setting"]]
    assert rows[2] == ["FedAvg", "0.00 MB, 12.00 s", "3.00 MB, 12.00 s", "0.00 MB, 12.00 s", "0.00 MB, 12.00 s"]


def test_bytes_by_part_are_shown_where_more_than_the_text_model_is_trained(folder: Path) -> None:
    def with_parts(method: str, **parts: int) -> None:
        for cell in json.loads((folder / "sweep.json").read_text())["cells"]:
            if cell["axes"]["method"] == method:
                file = folder / cell["id"] / "result.json"
                file.write_text(json.dumps(json.loads(file.read_text()) | {"bytes_by_part": {"up": parts, "down": parts}}))

    heading = "The megabytes by the part of the model"
    with_parts("FedAvg", text=1_000_000)
    assert heading not in "\n".join(page([folder]).lines)
    with_parts("Broken", text=2_000_000, projector=3_000_000)
    head, *rows = rows_of("\n".join(page([folder]).lines), heading)
    assert head == ["method", "text", "projector"]
    assert rows == [["zero-shot", "–", "–"], ["local", "–", "–"], ["FedAvg", "2.00", "0.00"], ["Broken", "4.00", "6.00"]]


def test_a_page_of_several_sweeps_begins_with_links_to_them(folder: Path, tmp_path: Path) -> None:
    other = make_sweep(tmp_path / "other", AXES, hits, kinds=KINDS)
    index = other / "sweep.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"name": "My study, no. 2"}))
    lines = page([folder, other]).lines
    assert lines[2].startswith("- [made](#made): ")
    assert lines[2].endswith("16 of 16 cells complete, 25 runs")
    assert lines[3].startswith("- [My study, no. 2](#my-study-no-2): ")
    assert "## My study, no. 2" in lines
    assert not any(line.startswith("- [") for line in page([folder]).lines)


def test_the_best_federated_method_between_the_baselines(tmp_path: Path) -> None:
    axes = {"setting": ["aligned", "cross"], "method": ["zero-shot", "local", "centralised", "FedAvg", "FedYogi"]}
    shares = {"zero-shot": 0.5, "local": 0.6, "centralised": 0.9, "FedAvg": 0.8, "FedYogi": 0.7}

    def answered(cell: Mapping[str, str], seed: int, pattern: str) -> float:
        better = cell["setting"] == "cross" and cell["method"] == "FedYogi"
        return 0.825 if better else shares[cell["method"]]

    kinds = {name: name for name in ("zero-shot", "local", "centralised")}
    lines = page([make_sweep(tmp_path / "grid", axes, answered, kinds=kinds)]).lines
    head, *rows = rows_of("\n".join(lines), "### Between the baselines")
    assert head[0] == "place"
    assert [[*row[:4], *row[5:7]] for row in rows] == [
        ["aligned", "50.0", "60.0", "90.0", "FedAvg", "80.0"],
        ["cross", "50.0", "60.0", "90.0", "FedYogi", "82.5"],
    ]
    assert [row[4] for row in rows] == ["FedAvg", "FedAvg, FedYogi"]
    assert [row[9] for row in rows] == ["75 %", "81 %"]
    above, low, high = map(float, re.findall(r"[+-][\d.]+", rows[0][7]))
    assert above == 30.0
    assert 10 < low < 30 < high < 50
    assert rows[0][8].startswith("+20.0 [")


def test_the_best_over_the_settings_of_a_scenario(tmp_path: Path) -> None:
    """The best method by the mean over a scenario's settings is here not the best at any single setting."""
    axes = {"setting": ["β = 0.3", "β = 0.5", "p = 0.7"], "method": ["zero-shot", "local", "centralised", "One", "Two", "Even"]}
    shares = {"One": (0.8, 0.5, 0.6), "Two": (0.5, 0.8, 0.6), "Even": (0.75, 0.75, 0.6)}
    plain = {"zero-shot": 0.5, "local": 0.6, "centralised": 0.9}

    def answered(cell: Mapping[str, str], seed: int, pattern: str) -> float:
        setting = axes["setting"].index(cell["setting"])
        return shares[cell["method"]][setting] if cell["method"] in shares else plain[cell["method"]]

    def config(cell: Mapping[str, str]) -> dict[str, dict[str, str]]:
        trained = cell["method"] not in ("zero-shot", "centralised")
        return {"scenario": {"name": "aligned" if not trained else "missing" if cell["setting"].startswith("β") else "hybrid"}}

    kinds = {name: name for name in plain}
    text = "\n".join(page([make_sweep(tmp_path / "grid", axes, answered, kinds=kinds, config=config)]).lines)
    head, row = rows_of(text, "The same over the places of a scenario")
    assert head[0] == "scenario"
    assert [*row[:4], *row[5:7], row[9]] == ["missing (2)", "50.0", "60.0", "90.0", "Even", "75.0", "62 %"]
    assert row[8].startswith("+15.0 [+")


def test_scores_on_other_tasks_are_shown_in_a_table(tmp_path: Path) -> None:
    axes = {"task": ["pairs", "questions"], "method": ["Broken", "FedAvg"]}
    folder = make_sweep(tmp_path / "grid", axes, lambda cell, seed, pattern: SHARES[cell["method"]])
    for number in range(8):  # two consecutive runs per cell, one per seed
        path = folder / f"federated-{number}" / "result.json"
        result = json.loads(path.read_text())
        if number % 4 > 1:  # FedAvg
            metrics = {"both": {"auc": 0.5 + 0.1 * (number % 2)}}
            result["transfer"] = {"pocket-memes": {"primary_metric": "auc", "metrics": metrics}}
        if number > 3:
            result |= {"primary_metric": "macro_f1", "metrics": {"both": {"macro_f1": 0.7, "n": 40}}}
        path.write_text(json.dumps(result))
    text = "\n".join(page([folder]).lines)
    head, *rows = rows_of(text, "### Trained here × tested there")
    assert head == ["method", "task", "pocket-memes, auc"]
    assert rows == [["Broken", "pairs", "–"], ["Broken", "questions", "–"],
                    ["FedAvg", "pairs", "55.0 ± 7.1"], ["FedAvg", "questions", "55.0 ± 7.1"]]  # fmt: skip
    assert "accuracy or macro_f1 under the pattern" in text
    assert rows_of(text, "## made")[2][-1] == "–", "two metrics have no common mean"
    json.dumps(read_grid(folder).to_json())


def test_places_may_have_different_test_samples(tmp_path: Path) -> None:
    axes = {"task": ["pairs", "questions"], "method": ["local", "FedAvg"]}
    folder = make_sweep(tmp_path / "grid", axes, lambda cell, seed, pattern: SHARES[cell["method"]], kinds=KINDS)
    for cell in json.loads((folder / "sweep.json").read_text())["cells"]:
        if cell["axes"]["task"] == "questions":
            file = folder / cell["id"] / "predictions.jsonl"
            file.write_text(file.read_text().replace('"id": "s', '"id": "q'))
    lines = page([folder]).lines
    assert [row[0] for row in rows_of("\n".join(lines), "### Between the baselines")[1:]] == ["pairs", "questions"]
    assert rows_of("\n".join(lines), "over the places of a scenario")[1][0] == "aligned (2)"


def test_a_grid_without_baselines_has_no_section_about_them(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "grid", {"setting": ["a", "b"], "method": ["x", "y"]}, lambda *cell: 0.5)
    assert not any("Between" in line for line in page([folder]).lines)


def test_the_page_is_deterministic_and_writes_nothing_to_the_runs(folder: Path) -> None:
    first, again = page([folder]), page([folder])
    assert (first.lines, first.pictures) == (again.lines, again.pictures)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    page([folder])
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_cells_without_runs_are_reported(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "grid", AXES, hits, kinds=KINDS, missing="Broken")
    text = "\n".join(page([folder]).lines)
    assert "12 of 16 cells complete" in text
    assert "4 cells lack runs: α = 5 · Broken" in text
    assert rows_of(text, "## made")[4][1:] == ["–"] * 5


def test_an_undefined_score_is_unknown_and_the_other_cells_are_compared(tmp_path: Path) -> None:
    """A NaN, such as the AUC of a test set with one class, is stored as null."""
    folder = make_sweep(tmp_path / "grid", AXES, hits, kinds=KINDS)
    cells = json.loads((folder / "sweep.json").read_text())["cells"]
    cell = next(c for c in cells if c["axes"] == {"setting": "β = 0.3", "method": "FedAvg"})
    file = folder / cell["id"] / "result.json"
    result = json.loads(file.read_text())
    result["metrics"]["both"]["accuracy"] = None
    file.write_text(json.dumps(result))
    text = "\n".join(page([folder]).lines)
    assert rows_of(text, "## made")[3] == ["FedAvg", "92.5 ± 3.5", "–", "92.5 ± 3.5", "92.5 ± 3.5", "–"]
    best = {row[0]: row[6] for row in rows_of(text, "### Between the baselines")[1:]}
    assert best == {"α = 5": "92.5", "β = 0.3": "–", "I:T = 3:7": "92.5", "p < 1": "92.5"}, "one unit cannot be cross-fitted"
    assert "Left out: 1 replicate that FedAvg or zero-shot lacks." in text


def test_the_baseline_is_zero_shot_else_the_first_cell(folder: Path, tmp_path: Path) -> None:
    grid = read_grid(folder)
    assert choose_baseline(grid, None) == "zero-shot"
    assert choose_baseline(grid, "FedAvg") == "FedAvg"
    assert choose_baseline(grid, "not in this grid") == "zero-shot", "several sweeps share one --baseline"
    ablation = {"setting": ["a", "b"], "strategy": ["none", "both"]}
    other = make_sweep(tmp_path / "other", ablation, lambda cell, seed, pattern: 0.5)
    assert choose_baseline(read_grid(other), None) == "none"


@pytest.mark.parametrize("kind", ["file", "empty", "run", "twice", "text"])
def test_folders_and_names_that_are_rejected(folder: Path, tmp_path: Path, kind: str) -> None:
    make_run(tmp_path / "run", {"both": 0.5})
    empty = (
        make_sweep(tmp_path / "empty", {"setting": ["a"], "method": ["x"]}, hits, missing="x") if kind == "empty" else tmp_path
    )
    arguments, message = {
        "file": ([tmp_path / "nowhere"], "is not a sweep's folder"),
        "run": ([tmp_path / "run"], "is not a sweep's folder"),
        "empty": ([empty], "has no axis, or no complete run"),
        "twice": ([folder, folder], "another of the folders is also a sweep named 'made'"),
        "text": ([folder], "give a name that ends in .md or .html"),
    }[kind]
    done = call("report", *arguments, "--out", tmp_path / ("page.txt" if kind == "text" else "page.md"))
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "page.md").exists()


# The radar chart


def test_a_radar_chart_by_hand() -> None:
    svg = radar("a & b", ["north", "east", "south", "west"], {"one": [62, 80, 62, 71], "two": [None, 62, 65, 62]})
    root = ElementTree.fromstring(svg)
    assert root.findtext("{*}title") == "a & b"
    words = [t.text for t in root.findall("{*}text")]
    assert {"north", "west", "one", "two", "60", "70", "80"} <= set(words)
    shapes = [p.get("points", "") for p in root.findall("{*}polygon") if p.get("stroke") == "#0072b2"]
    # 60 is the centre and 80 the outer ring, 190 pixels away: 62 is 19 from the centre, 71 is 104.5.
    x, y = 190 * 1.1 + 16 + 5 * 7.5, 270
    assert shapes == [f"{x:.1f},{y - 19:.1f} {x + 190:.1f},{y:.1f} {x:.1f},{y + 19:.1f} {x - 104.5:.1f},{y:.1f}"]
    assert len(root.findall("{*}polyline")) == 2, "two segments remain of the line with a gap"


def test_the_scale_covers_every_score() -> None:
    assert scale([42, 69]) == (40, 70)
    assert scale([52, 52]) == (50, 60)
    assert scale([41, 70]) == (30, 70), "a score so close to the centre would be a dot"
    assert scale([0, 3]) == (0, 10)
    assert scale([35, 98]) == (20, 100), "a whole number of steps of 20"
    assert scale([5, 68]) == (0, 80)
    assert scale([100, 100]) == (90, 100)


def test_long_names_and_many_lines_fit_in_the_picture() -> None:
    names = {f"a method with a name of some length, no. {i}": [50.0, 60.0, 70.0] for i in range(40)}
    root = ElementTree.fromstring(radar("t", ["label-dependent, β = 0.5", "b", "c"], names))
    _, _, width, height = map(float, root.get("viewBox", "").split())
    for text in root.findall("{*}text"):
        x, length = float(text.get("x", "")), 7.0 * len(text.text or "")
        left = {"end": x - length, "middle": x - length / 2}.get(text.get("text-anchor", ""), x)
        assert left >= 0
        assert left + length <= width
        assert 0 < float(text.get("y", "")) < height


@pytest.mark.parametrize(("axes", "line"), [(["a", "b"], [1, 2]), (["a", "b", "c"], [None, None, None])])
def test_a_radar_chart_needs_three_axes_and_a_score(axes: list[str], line: list[float | None]) -> None:
    with pytest.raises(ValueError, match="three axes and a score"):
        radar("", axes, {"x": line})
