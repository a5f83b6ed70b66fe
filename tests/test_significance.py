"""`fedmllm compare --baseline` and `--by-pattern` on hand-made sweep folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from commands import call, run
from made_runs import make_run, make_sweep

AXES = {"setting": ["easy", "hard", "odd"], "method": ["zero-shot", "FedAvg", "Lazy"]}


def hits(cell: Mapping[str, str], seed: int, pattern: str) -> float:
    """FedAvg answers 0.9 and 0.8 correctly, by seed; with a single modality, every method answers half."""
    if pattern != "both":
        return 0.5
    return {"zero-shot": 0.5, "FedAvg": 0.9 - 0.1 * seed, "Lazy": 0.5}[cell["method"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_sweep(tmp_path / "grid", AXES, hits, kinds={"zero-shot": "zero-shot"})


def test_each_cell_is_tested_against_the_baseline(folder: Path) -> None:
    grid = run("compare", folder, "--baseline", "zero-shot")
    tests = grid["significance"]
    assert (tests["baseline"], tests["axis"]) == ("zero-shot", "method")
    assert len(tests["comparisons"]) == 6
    for comparison in tests["comparisons"]:
        if comparison["axes"]["method"] == "Lazy":
            assert (comparison["difference"], comparison["p"], comparison["p_holm"]) == (0, 1, 1)
        else:
            assert comparison["difference"] == pytest.approx(0.35)  # the mean of 0.4 and 0.3
            # 16 and 12 more correct answers: as far apart by chance in about 2 of 2¹⁶ exchanges.
            assert comparison["p"] < 0.001
            assert comparison["p_holm"] == pytest.approx(6 * comparison["p"]), "the smallest of six"
            assert comparison["ci"][0] > 0.15
    fedavg, lazy = tests["overall"]
    assert (fedavg["places"], fedavg["better"]) == (3, 3)
    assert fedavg["p"] == 2 / 8, "the least p of three places"
    assert (lazy["better"], lazy["p"]) == (0, 1)
    table = call("compare", folder, "--baseline", "zero-shot").stdout
    assert "points above zero-shot" in table
    assert "+35.0" in table


def test_seeds_that_share_a_run_count_once(folder: Path) -> None:
    row = next(r for r in run("compare", folder)["rows"] if r["axes"]["method"] == "zero-shot")
    assert row["ids"] == ["zero-shot"]
    assert (row["mean"], row["sd"]) == (0.5, None)


def test_scores_by_training_scenario_and_test_pattern(folder: Path) -> None:
    rows = run("compare", folder)["rows"]
    row = next(r for r in rows if r["axes"] == {"setting": "hard", "method": "FedAvg"})
    assert row["patterns"]["both"] == {"mean": pytest.approx(0.85), "sd": pytest.approx(0.1 / 2**0.5)}
    assert row["patterns"]["image"] == {"mean": 0.5, "sd": 0}
    assert row["worst_decile"]["mean"] == 0.4
    assert (row["seconds"], row["bytes"]) == (12, 2000)
    lines = call("compare", folder, "--by-pattern").stdout.splitlines()
    fedavg = [line for line in lines if "FedAvg" in line]
    assert [name for line in fedavg for name in AXES["setting"] if name in line] == AXES["setting"], (
        "the rows of a method are neighbours"
    )
    assert all("85.0" in line and "50.0" in line and "40.0" in line for line in fedavg)


def test_single_runs_are_tested_against_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, share in (("a", 0.5), ("b", 0.9), ("c", 0.5)):
        make_run(Path(name), {"both": share})
    done = call("compare", "a", "b", "c", "--baseline", "a", "--json")
    assert done.exit_code == 0, done.output
    rows = {row["run"]: row for row in json.loads(done.stdout)}
    assert "p" not in rows["a"]
    assert rows["b"]["difference"] == pytest.approx(0.4)
    assert rows["b"]["p_holm"] == pytest.approx(2 * rows["b"]["p"])
    assert rows["c"]["p"] == 1
    assert "+40.0" in call("compare", "a", "b", "c", "--baseline", "a").stdout


def test_runs_that_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "a", {"both": 0.5})
    make_run(tmp_path / "b", {"both": 0.5})
    lines = (tmp_path / "b" / "predictions.jsonl").read_text()
    compare_both = (tmp_path / "a", tmp_path / "b", "--baseline", tmp_path / "a")
    for arguments, message in [
        ((folder, "--baseline", "zero-shoot"), "has no cell of that name; did you mean 'zero-shot'?"),
        ((tmp_path / "a", tmp_path / "b", "--by-pattern"), "--by-pattern is for a sweep"),
        ((tmp_path / "a", "--baseline", tmp_path / "nowhere"), "is not a run directory"),
    ]:
        done = call("compare", *arguments)
        assert done.exit_code == 2
        assert message in done.stderr
    for damaged, message in [
        (lines.replace("s03", "s99"), "were not tested on the same samples"),
        (lines.replace("both", "text"), "has none under the pattern 'both'"),
        (lines[:-9], "predictions.jsonl cannot be read"),
    ]:
        (tmp_path / "b" / "predictions.jsonl").write_text(damaged)
        done = call("compare", *compare_both)
        assert done.exit_code == 2
        assert message in done.stderr
    (tmp_path / "b" / "predictions.jsonl").write_text(lines)
    result = tmp_path / "b" / "result.json"
    result.write_text(result.read_text().replace('"primary_metric": "accuracy"', '"primary_metric": "auc"'))
    assert "does not name the positive answer" in call("compare", *compare_both).stderr
    (tmp_path / "b" / "predictions.jsonl").unlink()
    assert call("compare", *compare_both).exit_code == 2


def test_auc_is_compared_by_probabilities(tmp_path: Path) -> None:
    """Twenty a and twenty b: one run ranks them perfectly, the other gives all the same score; the answers are the same."""
    for name in ("flat", "sharp"):
        make_run(tmp_path / name, {"both": 0.5})
        file, result = tmp_path / name / "predictions.jsonl", tmp_path / name / "result.json"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            line["score"] = 0.5 if name == "flat" else 0.9 if line["answer"] == "a" else 0.1
        file.write_text("\n".join(map(json.dumps, lines)))
        stored = json.loads(result.read_text()) | {"primary_metric": "auc", "positive": "a"}
        stored["metrics"]["both"] |= {"auc": 0.5 if name == "flat" else 1.0, "auc_ci": [0, 1]}
        result.write_text(json.dumps(stored))
    done = call("compare", tmp_path / "sharp", tmp_path / "flat", "--baseline", tmp_path / "flat", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)[0]["difference"] == 0.5
