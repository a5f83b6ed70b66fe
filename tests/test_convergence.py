"""Rounds, bytes and simulated time to a score, and the pictures of them, on hand-made run folders."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from scipy import stats

from fedmllm.errors import RunError
from fedmllm.report.convergence import Speeds, curve, reached, speeds
from fedmllm.report.curves import curves, mean_line, ticks
from fedmllm.report.grids import read_grid
from fedmllm.report.scores import Spread
from fedmllm.report.tables import comparison
from fedmllm.report.writeup import page
from fedmllm.storage.run_dir import RunDir
from made_runs import make_run, make_sweep, rows_of


def write_rounds(run: Path, scores: Mapping[int, float], rounds: int = 4, ends: Sequence[float] = ()) -> None:
    """`scores`: rounds completed -> the score of an evaluation at that point; 100 bytes each way per round. `ends` are the
    rounds' ends on a virtual clock."""
    lines = []
    for number in range(rounds):
        metrics = {"both": {"accuracy": scores[number + 1]}} if number + 1 in scores else None
        record = {"round": number, "bytes_up": {"a": 100}, "bytes_down": {"a": 100}, "metrics": metrics, "clock": {}}
        if ends:
            began = ends[number - 1] if number else 0.0
            record["clock"] = {"began": began, "seconds": ends[number] - began, "clients": {}, "lost": []}
        lines.append(json.dumps(record))
    (run / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    if ends:
        file = run / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"simulated_seconds": ends[-1]}))


def test_rounds_and_bytes_to_a_score(tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"both": 0.8})
    write_rounds(tmp_path / "run", {1: 0.2, 2: 0.75})
    points = curve(RunDir(tmp_path / "run"))
    assert points == [(1, 200, 0.2, None), (2, 400, 0.75, None), (4, 800, 0.8, None)], "the end of the run is a point"
    assert reached(points, 0.75) == (2, 400, 0.75, None)
    assert reached(points, 0.9) is None


@pytest.mark.parametrize("wrong", [{"score": 1.5}, {"score": -0.1}, {"end": 1e300}, {"end": -5.0}, {"end": math.nan}])
def test_points_that_no_run_writes_are_refused(wrong: dict[str, float], tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"both": 0.8})
    write_rounds(tmp_path / "run", {1: wrong.get("score", 0.2)}, 2, (wrong.get("end", 1.0), 2.0))
    with pytest.raises(RunError, match="a file is not as a run writes it"):
        curve(RunDir(tmp_path / "run"))


def test_an_evaluation_without_a_score_is_no_point(tmp_path: Path) -> None:
    """Null is the AUC of test samples of one class."""
    make_run(tmp_path / "run", {"both": 0.8})
    write_rounds(tmp_path / "run", {1: math.nan, 2: 0.5}, 3)
    file = tmp_path / "run" / "rounds.jsonl"
    file.write_text(file.read_text().replace("NaN", "null"))
    assert [point.rounds for point in curve(RunDir(tmp_path / "run"))] == [2, 3]


def test_the_target_is_a_score_that_a_run_reached(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "grid", {"setting": ["s"], "method": ["fast", "slow"]}, lambda c, s, p: 0.8, seeds=[0])
    for name, scores in (("federated-0", {1: 0.7, 2: 0.8}), ("federated-1", {1: 0.3, 2: 0.4, 4: 0.5})):
        write_rounds(folder / name, scores)
    result = folder / "federated-1" / "result.json"
    result.write_text(re.sub(r'("both": \{"accuracy": )0.8', r"\g<1>0.5", result.read_text()))
    found = speeds(folder, read_grid(folder).rows)
    assert isinstance(found, Speeds)
    assert found.target == pytest.approx(0.3 + 0.9 * 0.5)
    fast, slow = found.rows
    assert (fast.reached, fast.rounds, fast.bytes) == (1, 2, 400)
    assert (slow.reached, slow.rounds) == (0, None)
    assert slow.after == {1: Spread(0.3), 2: Spread(0.4)}, "4 is not one of the stops"
    text = "\n".join(page([folder]).lines)
    assert "### Rounds and bytes to 75.0" in text
    assert rows_of(text, "After so many rounds:") == [
        ["setting", "method", "1", "2"], ["s", "fast", "70.0", "80.0"], ["s", "slow", "30.0", "40.0"],
    ]  # fmt: skip
    assert rows_of(text, "## made")[0] == ["method", "s"], "a single place has no mean column"
    assert [len(row) for row in rows_of(text, "### Against fast")] == [8, 8]


def test_runs_that_were_evaluated_only_at_the_end_have_no_speed(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "grid", {"setting": ["s"], "method": ["x"]}, lambda c, s, p: 0.8)
    assert speeds(folder, read_grid(folder).rows) is None


def test_simulated_time_of_some_cells(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "grid", {"setting": ["s"], "method": ["fast", "slow"]}, lambda c, s, p: 0.8, seeds=[0])
    write_rounds(folder / "federated-0", {1: 0.2, 2: 0.8}, ends=(5.0, 10.0, 15.0, 20.0))
    write_rounds(folder / "federated-1", {1: 0.2, 2: 0.8})
    assert curve(RunDir(folder / "federated-0"))[1] == (2, 400, 0.8, 10.0)
    found = speeds(folder, read_grid(folder).rows)
    assert found is not None
    assert [row.seconds for row in found.rows] == [10.0, None]
    written = page([folder])
    text = "\n".join(written.lines)
    assert [row[-1] for row in rows_of(text, "### Rounds and bytes to 74.0")] == ["simulated seconds", "10.0", "–"]
    assert [row[1:] for row in rows_of(text, "### Simulated time to a score")[1:]] == [["fast", "10.0", "10.0", "10.0"]]
    assert rows_of(text, "### Cost") == [
        ["method", "MB", "seconds", "simulated seconds"], ["fast", "0.00", "12.00", "20.0"], ["slow", "0.00", "12.00", "–"],
    ]  # fmt: skip
    assert not written.pictures, "a line without a clock has no place in the picture"


METHODS = ["synchronous", "deadline", "FedBuff", "FedAsync"]
ENDS = {  # of the first two rounds by method and seed; the level is reached after the second
    "synchronous": [(10.0, 20.0), (11.0, 22.0), (12.0, 24.0)],
    "deadline": [(4.0, 8.0), (5.0, 11.0), (6.0, 15.0)],
    "FedBuff": [(5.0, 5.0), (5.0, 9.0), (5.0, 10.0)],  # two steps of the server can be at the same time
    "FedAsync": [(1.0, 2.0), (1.0, 3.0), (1.0, 4.0)],
}


@pytest.fixture
def stragglers(tmp_path: Path) -> Path:
    """FedBuff reaches the levels with two seeds of three, and FedAsync with none."""
    axes = {"setting": ["some", "many"], "method": METHODS}
    folder = make_sweep(tmp_path / "grid", axes, lambda c, s, p: 0.2, seeds=[0, 1, 2])
    for cell in json.loads((folder / "sweep.json").read_text())["cells"]:
        method, seed = cell["axes"]["method"], cell["seed"]
        best = 0.3 if method == "FedAsync" or (method, seed) == ("FedBuff", 2) else 0.8
        factor = 100 if cell["axes"]["setting"] == "many" else 1
        ends = [factor * end for end in ENDS[method][seed]]
        write_rounds(folder / cell["id"], {1: 0.2, 2: best}, 3, [*ends, 2 * ends[-1]])
    return folder


def test_simulated_time_to_a_score(stragglers: Path) -> None:
    text = "\n".join(page([stragglers], "synchronous").lines)
    head, *rows = rows_of(text, "### Simulated time to a score")
    assert head == ["setting", "method", "50.0", "65.0", "74.0"]
    half = stats.t.ppf(0.975, 2) * 2 / math.sqrt(3)
    assert [row[2:] for row in rows[:4]] == [
        [f"22.0 [{22 - half:.1f}, {22 + half:.1f}]"] * 3,
        ["11.3 [2.6, 20.1]"] * 3,  # 8, 11, 15: s.d. 3.512
        ["2 of 3, median 9.0"] * 3,
        ["never"] * 3,
    ]
    assert rows[4][2] == "2,200 [1,703, 2,697]"
    _, *ratios = rows_of(text, "as a multiple of that of synchronous")
    logs = [math.log(ours / theirs) for ours, theirs in ((8, 20), (11, 22), (15, 24))]
    low, high = stats.ttest_1samp(logs, 0).confidence_interval()
    least, most = stats.ttest_1samp([math.log(5 / 20), math.log(9 / 22)], 0).confidence_interval()
    assert [row[1:3] for row in ratios[:3]] == [
        ["deadline", f"{(0.4 * 0.5 * 0.625) ** (1 / 3):.2f} [{math.exp(low):.2f}, {math.exp(high):.2f}]"],
        ["FedBuff", f"{math.sqrt(0.25 * 9 / 22):.2f} [{math.exp(least):.2f}, {math.exp(most):.2f}] (2 of 3)"],
        ["FedAsync", "–"],
    ]
    assert [row[2] for row in ratios[3:]] == [row[2] for row in ratios[:3]], "a hundred times slower, both of them"


@pytest.mark.parametrize(("baseline", "base"), [("FedAsync", "FedAsync"), (None, "synchronous"), ("zero-shot", "synchronous")])
def test_what_times_are_compared_with(baseline: str | None, base: str, stragglers: Path) -> None:
    """A baseline that is not federated has no clock."""
    index = json.loads((stragglers / "sweep.json").read_text())
    if baseline == "zero-shot":
        make_run(stragglers / "zero-shot", {"both": 0.1}, kind="zero-shot")
        axes = [{"setting": setting, "method": "zero-shot"} for setting in ("some", "many")]
        zero = {"kind": "zero-shot", "id": "zero-shot", "state": "complete"}
        index["cells"] = [{"axes": a, "seed": s, **zero} for a in axes for s in range(3)] + index["cells"]
        (stragglers / "sweep.json").write_text(json.dumps(index))
    text = "\n".join(page([stragglers], baseline).lines)
    assert f"The time as a multiple of that of {base}:" in text
    rows = rows_of(text, "as a multiple of that of")
    assert [row[1] for row in rows[1:4]] == [name for name in METHODS if name != base]


def test_two_replicates_far_apart_have_an_interval_without_end(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "grid", {"setting": ["s"], "method": ["a", "b"]}, lambda c, s, p: 0.8)
    for number, ends in enumerate(((1.0, 2.0), (1.0, 2.0), (1.0, 2.0), (1e9, 2e9))):
        write_rounds(folder / f"federated-{number}", {1: 0.2}, 2, ends)
    text = "\n".join(page([folder]).lines)
    assert rows_of(text, "as a multiple of that of a")[1][2].endswith(" [0.00, > 1000]")


def test_the_picture_of_a_chapter_with_a_clock(stragglers: Path) -> None:
    pictures = page([stragglers]).pictures
    root = ElementTree.fromstring(pictures["figures/made-time.svg"])
    assert len(root.findall("{*}polyline")) == 4 * 3 * 2, "methods × costs × settings"
    words = [text.text for text in root.findall("{*}text")]
    assert [words.count(word) for word in ("rounds", "MB", "simulated seconds", "FedBuff", "some", "many")] == [
        2,
        2,
        2,
        1,
        1,
        1,
    ]


def test_the_mean_of_curves() -> None:
    assert mean_line([[(1, 20.0), (3, 40.0)]]) == [(1, 20.0), (3, 40.0)]
    assert mean_line([[(0, 10.0), (4, 50.0)], [(2, 20.0), (3, 40.0)]]) == [(2, 25.0), (3, 40.0), (4, 45.0)]
    steps_at_one_time = [(0.0, 10.0), (5.0, 20.0), (5.0, 30.0), (6.0, 30.0)]
    assert mean_line([steps_at_one_time]) == [(0.0, 10.0), (5.0, 30.0), (6.0, 30.0)]
    assert mean_line([[(1, 10.0)], [(5, 20.0)]]) == [(5, 15.0)]


@pytest.mark.parametrize(
    ("high", "expected"),
    [(1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (10, [0, 2, 4, 6, 8, 10]), (26, [0, 10, 20]), (5, [0, 1, 2, 3, 4, 5]),
     (12_345, [0, 5000, 10_000]), (0.03, [0, 0.01, 0.02, 0.03]), (1e6, [0, 2e5, 4e5, 6e5, 8e5, 1e6])],
)  # fmt: skip
def test_the_ticks_of_an_axis(high: float, expected: list[float]) -> None:
    assert ticks(high) == pytest.approx(expected)


def test_curves_by_hand() -> None:
    lines = {"a & b": [(0.0, 60.0), (10.0, 70.0)], "<c>": [(5.0, 62.0)]}
    root = ElementTree.fromstring(curves("x < y", {"": {"rounds": lines, "no cost": {"a & b": [(0.0, 65.0)]}}}))
    assert root.findtext("{*}title") == "x < y"
    # 50 is the bottom at 70 + 170 and 70 the top; the first panel begins 46 from the left and the second 302 further right.
    assert [line.get("points") for line in root.findall("{*}polyline")] == [
        "46.0,155.0 286.0,70.0", "166.0,138.0", "348.0,112.5",
    ]  # fmt: skip
    assert {"a & b", "<c>", "rounds", "50", "60", "70", "10"} <= {text.text for text in root.findall("{*}text")}
    with pytest.raises(ValueError, match="need a point"):
        curves("", {"": {"rounds": {}}})


def test_simulated_time_stands_beside_rounds_in_the_terminal(tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"both": 0.8})
    plain = json.loads((tmp_path / "run" / "result.json").read_text())
    headers = [column.header for column in comparison([plain]).columns]
    assert headers == ["run", "both", "rounds", "MB up", "MB down", "seconds"]
    table = comparison([plain, plain | {"simulated_seconds": None}, plain | {"simulated_seconds": 1234.5}])
    assert [column.header for column in table.columns][2:4] == ["rounds", "simulated s"]
    assert list(table.columns[3].cells) == ["–", "–", "1234"]
