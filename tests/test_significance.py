"""`fedmllm compare --baseline` and `--by-pattern` on hand-made folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from commands import call, run
from made_runs import make_run, make_sweep

AXES = {"setting": ["easy", "hard", "odd"], "method": ["zero-shot", "FedAvg", "Lazy"]}


def hits(cell: Mapping[str, str], seed: int, pattern: str) -> float:
    """FedAvg answers 0.9 and 0.8 by seed; under one modality everybody half."""
    if pattern != "both":
        return 0.5
    return {"zero-shot": 0.5, "FedAvg": 0.9 - 0.1 * seed, "Lazy": 0.5}[cell["method"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_sweep(tmp_path / "grid", AXES, hits, kinds={"zero-shot": "zero-shot"})


def test_each_cell_is_tested_against_the_baselines(folder: Path) -> None:
    grid = run("compare", folder, "--baseline", "zero-shot")
    found = grid["significance"]
    assert (found["baseline"], found["axis"]) == ("zero-shot", "method")
    assert len(found["comparisons"]) == 6
    for one in found["comparisons"]:
        if one["axes"]["method"] == "Lazy":
            assert (one["difference"], one["p"], one["p_holm"]) == (0, 1, 1)
        else:
            assert one["difference"] == pytest.approx(0.35)  # the mean of 0.4 and 0.3
            # Answers of 16 and 12 more samples: as far by chance in about 2 of 2¹⁶ exchanges.
            assert one["p"] < 0.001
            assert one["p_holm"] == pytest.approx(6 * one["p"]), "the smallest of six"
            assert one["ci"][0] > 0.15
    fedavg, lazy = found["overall"]
    assert (fedavg["places"], fedavg["better"]) == (3, 3)
    assert fedavg["p"] == 2 / 8, "three settings cannot say more"
    assert (lazy["better"], lazy["p"]) == (0, 1)
    table = call("compare", folder, "--baseline", "zero-shot").stdout
    assert "points above zero-shot" in table
    assert "+35.0" in table


def test_seeds_that_share_a_run_count_once(folder: Path) -> None:
    row = next(r for r in run("compare", folder)["rows"] if r["axes"]["method"] == "zero-shot")
    assert row["ids"] == ["zero-shot"]
    assert (row["mean"], row["sd"]) == (0.5, None)


def test_trained_in_by_tested_with(folder: Path) -> None:
    rows = run("compare", folder)["rows"]
    row = next(r for r in rows if r["axes"] == {"setting": "hard", "method": "FedAvg"})
    assert row["patterns"]["both"] == {"mean": pytest.approx(0.85), "sd": pytest.approx(0.1 / 2**0.5)}
    assert row["patterns"]["image"] == {"mean": 0.5, "sd": 0}
    assert row["worst_decile"]["mean"] == 0.4
    assert (row["seconds"], row["bytes"]) == (12, 2000)
    lines = call("compare", folder, "--by-pattern").stdout.splitlines()
    fedavg = [line for line in lines if "FedAvg" in line]
    assert [name for line in fedavg for name in AXES["setting"] if name in line] == AXES["setting"], (
        "one method's rows together"
    )
    assert all("85.0" in line and "50.0" in line and "40.0" in line for line in fedavg)


def test_single_runs_against_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "a", {"both": 0.5})
    make_run(tmp_path / "b", {"both": 0.5})
    lines = (tmp_path / "b" / "predictions.jsonl").read_text()
    ab = (tmp_path / "a", tmp_path / "b", "--baseline", tmp_path / "a")
    for arguments, sentence in [
        ((folder, "--baseline", "zero-shoot"), "has no cell of that name; did you mean 'zero-shot'?"),
        ((tmp_path / "a", tmp_path / "b", "--by-pattern"), "--by-pattern is of a sweep"),
        ((tmp_path / "a", "--baseline", tmp_path / "nowhere"), "is not a run directory"),
    ]:
        done = call("compare", *arguments)
        assert done.exit_code == 2
        assert sentence in done.stderr
    for damage, sentence in [
        (lambda: lines.replace("s03", "s99"), "were not tested on the same samples"),
        (lambda: lines.replace("both", "text"), "has none under the pattern 'both'"),
        (lambda: lines[:-9], "predictions.jsonl cannot be read"),
    ]:
        (tmp_path / "b" / "predictions.jsonl").write_text(damage())
        done = call("compare", *ab)
        assert done.exit_code == 2
        assert sentence in done.stderr
    (tmp_path / "b" / "predictions.jsonl").write_text(lines)
    result = tmp_path / "b" / "result.json"
    result.write_text(result.read_text().replace('"primary_metric": "accuracy"', '"primary_metric": "auc"'))
    assert "which answer is the positive one" in call("compare", *ab).stderr
    (tmp_path / "b" / "predictions.jsonl").unlink()
    assert call("compare", *ab).exit_code == 2


def test_auc_is_tested_on_the_probabilities(tmp_path: Path) -> None:
    """Twenty a and twenty b: one run ranks them perfectly, the other all alike; the hard answers are the same."""
    for name in ("flat", "sharp"):
        make_run(tmp_path / name, {"both": 0.5})
        file, result = tmp_path / name / "predictions.jsonl", tmp_path / name / "result.json"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            line["score"] = 0.5 if name == "flat" else 0.9 if line["answer"] == "a" else 0.1
        file.write_text("\n".join(map(json.dumps, lines)))
        told = json.loads(result.read_text()) | {"primary_metric": "auc", "positive": "a"}
        told["metrics"]["both"] |= {"auc": 0.5 if name == "flat" else 1.0, "auc_ci": [0, 1]}
        result.write_text(json.dumps(told))
    done = call("compare", tmp_path / "sharp", tmp_path / "flat", "--baseline", tmp_path / "flat", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)[0]["difference"] == 0.5
