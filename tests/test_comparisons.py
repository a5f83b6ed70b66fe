"""`fedmllm compare --baseline` and `--by-pattern` on hand-made sweep folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from commands import call, run
from made_runs import make_run, make_sweep, replicated

AXES = {"setting": ["easy", "hard", "odd"], "method": ["zero-shot", "FedAvg", "Lazy"]}


def hits(cell: Mapping[str, str], seed: int, pattern: str) -> float:
    """FedAvg answers 0.9 and 0.8 correctly, by seed; with a single modality, every method answers half."""
    if pattern != "both":
        return 0.5
    return {"zero-shot": 0.5, "FedAvg": 0.9 - 0.1 * seed, "Lazy": 0.5}[cell["method"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_sweep(tmp_path / "grid", AXES, hits, kinds={"zero-shot": "zero-shot"})


def test_each_method_is_compared_with_the_baseline(folder: Path) -> None:
    """Runs with seeds share them over the places: FedAvg is 0.4 and 0.3 above zero-shot at every place, by seed."""
    compared = run("compare", folder, "--baseline", "zero-shot")["significance"]
    assert (compared["baseline"], compared["axis"]) == ("zero-shot", "method")
    assert len(compared["comparisons"]) == 6
    for comparison in compared["comparisons"]:
        expected = 0 if comparison["axes"]["method"] == "Lazy" else 0.35
        assert comparison["difference"] == pytest.approx(expected)
        assert (comparison["p"], comparison["p_holm"]) == (None, None), "a single place has an interval and no p"
    fedavg, lazy = compared["overall"]
    assert (fedavg["places"], fedavg["better"], fedavg["units"]) == (3, 3, 2), "a unit is a seed, not a seed at a place"
    assert fedavg["common"] > 0, "all units share one test set"
    standard_error = (0.05**2 + fedavg["common"]) ** 0.5
    assert (fedavg["ci"][1] - fedavg["ci"][0]) / 2 > 1.96 * standard_error
    assert fedavg["p_holm"] == pytest.approx(fedavg["p"]), "Lazy has no p that would count"
    assert fedavg["worst"] == pytest.approx(0.3)
    assert (lazy["better"], lazy["p"]) == (0, None), "differences without any spread have no p"
    shown = call("compare", folder, "--baseline", "zero-shot").stdout
    assert "points above zero-shot" in shown
    assert "+35.0 [" in shown
    assert "Lazy against zero-shot: +0.0 points in 2 replicates; no test: all replicates have the same difference." in shown


def test_replicates_of_all_places_are_units(tmp_path: Path) -> None:
    shift = {"easy": [1, 2, 3, 4], "hard": [3, 3, 5, 5]}

    def scores(place: str, method: str, r: int) -> float:
        return 0.5 + 0.1 * r + (shift[place][r] / 100 if method == "new" else 0)

    folder = replicated(tmp_path / "grid", scores, margin=5.0)
    compared = run("compare", folder, "--baseline", "base")["significance"]
    (new,) = compared["overall"]
    assert compared["not_beaten"] == ["new"]
    assert new["difference"] == pytest.approx((0.025 + 0.04) / 2)
    variances = [np.var(values, ddof=1) / 4 / 100**2 / 4 for values in shift.values()]
    df = sum(variances) ** 2 / sum(v**2 / 3 for v in variances)
    assert new["p"] == pytest.approx(2 * stats.t.sf(new["difference"] / sum(variances) ** 0.5, df))
    assert (new["units"], new["places"], new["common"], new["worst"]) == (8, 2, 0, pytest.approx(0.01))
    shown = " ".join(call("compare", folder, "--baseline", "base").stdout.split())
    assert "new is above base by 3.2 points [" in shown.replace("3.3", "3.2")
    assert "no effect larger than ±5.0 points" in shown, "the margin that the sweep declared"


def test_settings_with_the_same_draws_are_averaged_within_a_replicate(tmp_path: Path) -> None:
    """As those of an attack, which leave the data as they are: their differences are no independent units."""
    shift = {"easy": [1, 2, 3, 6], "hard": [3, 4, 5, 8]}

    def scores(place: str, method: str, r: int) -> float:
        return 0.5 + 0.1 * r + (shift[place][r] / 100 if method == "new" else 0)

    folder = replicated(tmp_path / "grid", scores, draws=lambda place, method, r: r, digests=lambda place, r: f"test {r}")
    (new,) = run("compare", folder, "--baseline", "base")["significance"]["overall"]
    expected = stats.ttest_1samp([0.02, 0.03, 0.04, 0.07], 0)
    assert new["difference"] == pytest.approx(0.04)
    assert new["p"] == pytest.approx(expected.pvalue)
    assert new["ci"] == pytest.approx(list(expected.confidence_interval()))
    assert (new["units"], new["places"], new["common"]) == (4, 2, 0)
    done = call("report", folder, "--baseline", "base", "--out", tmp_path / "page.md")
    assert done.exit_code == 0, done.output
    assert "These settings have the same draws, so a unit is a replicate averaged over" in (tmp_path / "page.md").read_text()


def test_one_run_may_serve_settings_with_the_same_draws(tmp_path: Path) -> None:
    """As that of zero-shot, which no attack changes."""
    folder = replicated(tmp_path / "grid", lambda place, method, r: 0.5 + 0.1 * r * (method == "new"),
                        draws=lambda place, method, r: r, digests=lambda place, r: f"test {r}")  # fmt: skip
    index = folder / "sweep.json"
    index.write_text(re.sub(r"base-1-(\d)", r"base-0-\1", index.read_text()))
    (new,) = run("compare", folder, "--baseline", "base")["significance"]["overall"]
    assert (new["units"], new["difference"]) == (4, pytest.approx(0.15))


def test_places_and_replicates_that_one_side_lacks_are_named_and_counted(tmp_path: Path) -> None:
    folder = replicated(tmp_path / "grid", lambda place, method, r: 0.5 + 0.01 * r * (method == "new"))
    for run_id in ("new-0-3", *(f"new-1-{r}" for r in range(4))):  # the first place is easy, the second hard
        (folder / run_id / "result.json").unlink()
    (new,) = run("compare", folder, "--baseline", "base")["significance"]["overall"]
    assert (new["units"], new["dropped"], new["lost"], new["places"]) == (3, 1, ["hard"], 1)
    shown = call("compare", folder, "--baseline", "base").stdout
    assert "Left out: 1 replicate that new or base lacks." in shown
    assert "Without a common replicate: hard." in shown


def test_a_fixed_test_set_widens_the_interval(tmp_path: Path) -> None:
    """A generated task has the same ids and answers in every draw, and yet other samples."""

    def scores(place: str, method: str, r: int) -> float:
        return 0.5 + (0.01 * (r + 1) if method == "new" else 0)

    compared = []
    cases: list[tuple[Callable[[str, int], str], bool]]
    cases = [(lambda place, r: f"{place} {r}", False), (lambda place, r: "one", True), (lambda place, r: "one", False)]
    for number, (digests, generated) in enumerate(cases):
        folder = replicated(tmp_path / str(number), scores, digests=digests, generated=generated)
        for result in folder.glob("new-*/result.json"):  # one test set is lucky for all runs of the new method alike
            stored = json.loads(result.read_text())
            lucky = stored["metrics"]["both"]["accuracy"] + np.random.default_rng(99).normal(0, 0.05, 200)
            result.write_text(json.dumps(stored | {"bootstrap_scores": {"both": lucky.tolist()}}))
        for result in folder.glob("base-*/result.json"):
            stored = json.loads(result.read_text())
            result.write_text(json.dumps(stored | {"bootstrap_scores": {"both": [0.5] * 200}}))
        compared.append(run("compare", folder, "--baseline", "base")["significance"]["overall"][0])
    fresh, drawn, fixed = compared
    assert drawn == fresh
    assert fresh["common"] == 0
    assert fixed["common"] == pytest.approx(0.05**2, rel=0.3)
    assert fixed["ci"][1] - fixed["ci"][0] > 2 * (fresh["ci"][1] - fresh["ci"][0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": lambda place, method, r: hash_of(place, method, r)}, "base and new have different draws of the data"),
        ({"digests": lambda place, r: "same" if r < 2 else str(r)}, "some replicates share their test samples"),
        ({"digests": lambda place, r: "one" if place == "easy" else str(r)}, "some replicates share their test samples"),
    ],
)
def test_units_that_are_not_comparable_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    folder = replicated(tmp_path / "grid", lambda place, method, r: 0.5 + 0.01 * r, **settings)
    refused = call("compare", folder, "--baseline", "base")
    assert refused.exit_code == 2, refused.output
    assert message in refused.stderr


def test_a_run_that_serves_two_replicates_is_refused(tmp_path: Path) -> None:
    folder = replicated(tmp_path / "grid", lambda place, method, r: 0.5 + 0.01 * r)
    index = folder / "sweep.json"
    index.write_text(index.read_text().replace('"new-0-1"', '"new-0-0"'))
    refused = call("compare", folder, "--baseline", "base")
    assert refused.exit_code == 2
    assert "have different test samples in replicate 1" in refused.stderr
    for result in folder.glob("*/result.json"):
        result.write_text(re.sub(r'"test_digest": "\w+ \d"', '"test_digest": "one"', result.read_text()))
    assert "one run of new serves several replicates" in call("compare", folder, "--baseline", "base").stderr


def hash_of(place: str, method: str, r: int) -> int:
    return ["easy", "hard"].index(place) * 100 + ["base", "new"].index(method) * 10 + r


def test_two_equal_methods_differ_in_one_of_twenty_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command on 200 grids of two equal methods, with effects of the place and of the replicate."""
    monkeypatch.setattr("fedmllm.report.units.DRAWS", 2)
    rng, significant = np.random.default_rng(7), 0
    for repetition in range(200):
        units = {(place, r): rng.normal(0, 0.1) for place in ("easy", "hard") for r in range(4)}

        def scores(place: str, method: str, r: int, units: dict[tuple[str, int], float] = units) -> float:
            spread = 0.02 if place == "easy" else 0.06
            return 0.6 + (0.2 if place == "easy" else 0) + units[place, r] + spread * rng.standard_normal()

        folder = replicated(tmp_path / str(repetition), scores, resamples=2)
        (new,) = run("compare", folder, "--baseline", "base")["significance"]["overall"]
        significant += new["p_holm"] < 0.05
        assert (new["p_holm"] < 0.05) == (not new["ci"][0] < 0 < new["ci"][1])
    assert 0.02 <= significant / 200 <= 0.08


def test_a_pilot_says_how_many_replicates_it_takes(tmp_path: Path) -> None:
    def scores(place: str, method: str, r: int) -> float:
        return 0.5 + (0.02 * (r % 2) if method == "new" else 0)  # s.d. of the differences: 0.02 · √(1/3)

    pilot, short = replicated(tmp_path / "pilot", scores), replicated(tmp_path / "short", scores, replicates=1)
    (tmp_path / "base.toml").write_text('[task]\nname = "shapes-qa"\n')
    sweep = tmp_path / "grid.toml"
    cells = '[{ name = "a" }, { name = "b", set = { "train.lr" = 0.1 } }]'
    sweep.write_text(f'name = "grid"\nbase = "base.toml"\n[[axes]]\nname = "m"\ncells = {cells}\n')
    (plan,) = run("sweep", sweep, "--pilot", pilot, "--baseline", "base", "--effect", 2)
    assert (plan["method"], plan["places"], plan["sd"]) == ("new", 2, pytest.approx(0.02 / 3**0.5))
    t = stats.t.ppf([0.975, 0.8], 2 * (plan["replicates"] - 1)).sum()
    assert t * plan["sd"] / (2 * plan["replicates"]) ** 0.5 <= 0.02, "enough"
    fewer = plan["replicates"] - 1
    assert fewer < 2 or stats.t.ppf([0.975, 0.8], 2 * (fewer - 1)).sum() * plan["sd"] / (2 * fewer) ** 0.5 > 0.02
    assert plan["hours"] == pytest.approx(plan["replicates"] * 2 * 36 / 3600), "two runs a replicate"
    assert "replicates to find 2 points" in call("sweep", sweep, "--pilot", pilot, "--baseline", "base", "--effect", 2).stdout
    for arguments, message in [
        (("--pilot", pilot), "--pilot needs --baseline NAME"),
        (("--pilot", pilot, "--baseline", "bose"), "did you mean 'base'?"),
        (("--pilot", pilot, "--baseline", "base", "--effect", 0), "an effect above 0"),
        (("--pilot", short, "--baseline", "base"), "no method has two replicates at a place that 'base' also has"),
    ]:
        refused = call("sweep", sweep, *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr


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


def test_single_runs_have_a_difference_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, share in (("a", 0.5), ("b", 0.9), ("c", 0.5)):
        make_run(Path(name), {"both": share})
    done = call("compare", "a", "b", "c", "--baseline", "a", "--json")
    assert done.exit_code == 0, done.output
    rows = {row["run"]: row for row in json.loads(done.stdout)}
    assert "difference" not in rows["a"]
    assert (rows["b"]["against"], rows["b"]["difference"]) == ("a", pytest.approx(0.4))
    assert not {"p", "p_holm", "ci"} & rows["b"].keys(), "one run says nothing about other seeds or data"
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
