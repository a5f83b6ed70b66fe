"""Suites on a real model: at the end of a run, by `fedmllm eval`, and in the report."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from scipy import stats

import fedmllm.evaluation.suites as suites_folder
from commands import call, run
from fedmllm.data.prompts import Conversation
from fedmllm.errors import RunError
from fedmllm.models.mllm import MLLM
from fedmllm.report.suites import KEY_FIGURES
from fedmllm.report.writeup import page
from helpers import png
from made_runs import make_sweep, rows_of

Write = Callable[..., Path]
ALL = ["attribution", "corruption", "cross-modal"]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_is_examined_and_examined_again(write_experiment: Write) -> None:
    few = ("--set", "task.test_samples=6", "--set", 'eval.patterns=["both", "text"]')
    suites = ("--set", "eval.suites=" + json.dumps(ALL))
    result = run("run", write_experiment(rounds=1), *few, *suites, "--out", "a")
    found = result["suites"]
    assert list(found) == ALL
    assert json.loads(Path("a", "result.json").read_text())["suites"] == found
    for pattern, curves in found["corruption"]["details"]["scores"].items():
        assert {curve[0] for curve in curves.values()} == {result["metrics"][pattern]["accuracy"]}, (
            "severity 0 is the plain test"
        )
    assert found["attribution"]["tables"]["shapley"]["score"]["n"] > 0
    assert [row["client"] for row in found["attribution"]["details"]["clients"]] == [0, 1, 2, 3]

    plain = run("run", write_experiment(rounds=1), *few, "--out", "b")
    assert plain["suites"] == {}
    assert (plain["metrics"], plain["adapter_sha256"]) == (result["metrics"], result["adapter_sha256"])
    again = run("eval", "b", "--trust-config", "--suite", "cross-modal", "--suite", "attribution")
    assert again["suites"].keys() == {"attribution", "cross-modal"}
    assert again["suites"]["cross-modal"] == found["cross-modal"]
    stored = json.loads(Path("b", "result.json").read_text())
    assert stored["suites"] == again["suites"]
    assert stored | {"suites": {}} == plain, "nothing else is changed"
    other = call("eval", "a", "--trust-config", "--suite", "cross-modal", "--patterns", "image")
    assert "cross-modal: " in other.stdout
    assert json.loads(Path("a", "result.json").read_text()) == result, "other settings are not the run's own result"
    assert "cross-modal" not in call("eval", "a", "--trust-config").stdout, "only what is asked for"


def test_clients_models_of_their_own(write_experiment: Write) -> None:
    settings = ("--set", "task.test_samples=4", "--set", 'eval.suites=["attribution"]')
    file = write_experiment(rounds=1)
    personal = run("run", file, *settings, "--set", "algorithm.name=fedsa-lora", "--out", "a")["suites"]["attribution"]
    assert personal["details"]["clients"]
    alone = run("baseline", "local", file, *settings, "--set", "eval.clients=1")["suites"]["attribution"]
    assert alone == {
        "tables": {},
        "unavailable": ["Clients that train alone keep no model, so that there is none to examine."],
        "details": {},
    }
    assert run("baseline", "zero-shot", file, *settings)["suites"]["attribution"]["tables"]["gains"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('["corupted"]', "eval.suites: there is no suite 'corupted'; did you mean 'corruption'?"),
        ('["corruption", "corruption"]', "eval.suites: must name each suite once"),
        ("[]", "eval.suites: must not be empty"),
        ('"corruption"', "eval.suites: must be a list"),
    ],
)
def test_unknown_suites_are_refused(value: str, message: str, write_experiment: Write) -> None:
    done = call("check", write_experiment(), "--set", f"eval.suites={value}")
    assert done.exit_code == 2
    assert message in done.stderr


def test_pictures_that_are_asked_about_once_are_forgotten(model: MLLM) -> None:
    talk = Conversation("what is it?", "red", True, ("red", "blue"))
    model.encode([talk], [png()], 300)
    model.prepare_features()
    with model.forgetting_pictures():
        encoded = model.encode([talk, talk], [png((1, 2, 3)), png()], 300)
        first = model.last_logits(encoded, [(), ()], 1)
        assert [sample.pictures for sample in encoded] == [(1,), (0,)]
    (other,) = model.encode([talk], [png((200, 210, 250))], 300)
    assert other.pictures == (1,), "its number is free again"
    assert not first[0].equal(model.last_logits([other], [()], 1)[0]), "and nothing is left of the picture that had it"
    assert model.prepare_features() == 2


def test_the_report_has_the_means_over_runs(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", {"scenario": ["α", "β"], "method": ["fedavg"]}, lambda *_: 0.5)
    for number, path in enumerate(sorted(folder.glob("federated-*/result.json"))):
        result = json.loads(path.read_text())
        rows = {"both": {"clean": 0.5 + number / 100, "n": 12}, "a|b": {"clean": None if number else 0.25}}
        findings = {"tables": {"robustness": rows, "empty": {}}, "unavailable": [], "details": {}}
        path.write_text(json.dumps(result | {"suites": {"corruption": findings}}))
    text = "\n".join(page([folder]).lines)
    assert "### What the models use" in text
    assert "corruption: robustness" in text
    assert "corruption: empty" not in text
    assert "| cell |  | clean | n |" in text
    assert f"| α · fedavg | both | 50.5 ± {100 * math.sqrt(0.5) / 100:.1f} | 12 |" in text
    assert "| β · fedavg | both | 52.5 ± 0.7 | 12 |" in text
    assert "| α · fedavg | a&#124;b | – | – |" in text


def examined(folder: Path, figures: Mapping[str, Sequence[Mapping[str, float | None]]]) -> None:
    """Give the runs of each cell, in the order of their seeds, these findings: "robustness" and both "gains"."""
    for cell in json.loads((folder / "sweep.json").read_text())["cells"]:
        of_run = dict(figures[cell["axes"]["method"]][cell["seed"]])
        path = folder / cell["id"] / "result.json"
        result = json.loads(path.read_text())
        robust = {"both": {"clean": 0.9, "robustness": of_run.pop("robustness")}}
        gains = {modality: {"n": 10, "gain": gain} for modality, gain in of_run.items()}
        tables = {"corruption": {"robustness": robust}, "attribution": {"gains": gains}, "own": {"x": {"all": {"y": 0.5}}}}
        found = {suite: {"tables": t, "unavailable": [], "details": {}} for suite, t in tables.items()}
        path.write_text(json.dumps(result | {"suites": found}))


def test_key_figures_have_intervals_and_are_compared_with_the_baseline(tmp_path: Path) -> None:
    axes, seeds = {"scenario": ["cross"], "method": ["zero-shot", "fedavg", "fedyogi"]}, [0, 1, 2]
    folder = make_sweep(tmp_path / "made", axes, lambda *_: 0.5, seeds=seeds, kinds={"zero-shot": "zero-shot"})
    trained = [{"robustness": r, "image": i, "text": -0.025} for r, i in ((0.7, 0.1), (0.8, 0.2), (0.9, 0.4))]
    partly = [{"robustness": r, "image": i} for r, i in ((0.6, 0.1), (0.5, None), (0.7, 0.3))]
    examined(folder, {"zero-shot": [{"robustness": 0.6, "image": 0.0, "text": 0.0}] * 3, "fedavg": trained, "fedyogi": partly})
    text = "\n".join(page([folder]).lines)
    half = stats.t.ppf(0.975, 2) * 10 / math.sqrt(3)
    head, *rows = rows_of(text, "corruption: key figures")
    assert head == ["scenario", "method", "robustness, both"]
    assert [row[2] for row in rows] == [
        "60.0", f"80.0 [{80 - half:.1f}, {80 + half:.1f}]", f"60.0 [{60 - half:.1f}, {60 + half:.1f}]",
    ]  # fmt: skip
    assert [row[1:] for row in rows_of(text, "corruption: points above zero-shot, paired by replicate")[1:]] == [
        ["fedavg", f"+20.0 [{20 - half:+.1f}, {20 + half:+.1f}]"],
        ["fedyogi", f"+0.0 [{-half:+.1f}, {half:+.1f}]"],
    ]
    low, high = stats.ttest_1samp([10, 20, 40], 0).confidence_interval()
    wide = stats.t.ppf(0.975, 1) * 10
    head, *rows = rows_of(text, "attribution: key figures")
    assert head == ["scenario", "method", "image gain", "text gain"], "without columns that no run has"
    assert [row[2:] for row in rows] == [
        ["0.0", "0.0"],
        [f"23.3 [{low:.1f}, {high:.1f}]", "-2.5"],
        [f"20.0 [{20 - wide:.1f}, {20 + wide:.1f}] (2 of 3)", "–"],
    ]
    assert rows_of(text, "attribution: gains")[1][:2] == ["cross · zero-shot", "image"], "the whole table follows"
    assert "own: x" in text, "suites of plugins have their tables"
    assert "own: key figures" not in text


def test_a_difference_between_cells_is_paired(tmp_path: Path) -> None:
    """Both vary by ten points between replicates, and their difference by one."""
    folder = make_sweep(tmp_path / "made", {"s": ["a", "b"], "method": ["one", "two"]}, lambda *_: 0.5, seeds=[0, 1, 2])
    one = [{"robustness": r} for r in (0.5, 0.6, 0.7)]
    two = [{"robustness": r} for r in (0.54, 0.65, 0.76)]
    examined(folder, {"one": one, "two": two})
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert rows_of("\n".join(page([folder]).lines), "corruption: points above one, paired by replicate")[1:] == [
        [place, "two", f"+5.0 [{5 - half:+.1f}, {5 + half:+.1f}]"] for place in ("a", "b")
    ]


def test_the_score_falls_with_the_severity_in_a_picture(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", {"s": ["a"], "method": ["one", "two"]}, lambda *_: 0.5, seeds=[0, 1])
    examined(folder, {name: [{"robustness": 0.5}] * 2 for name in ("one", "two")})
    assert "figures/made-corruption.svg" not in page([folder]).pictures, "not all severities are known"
    for number, path in enumerate(sorted(folder.glob("federated-*/result.json"))):
        result = json.loads(path.read_text())
        scores = {"clean": 0.9, **{f"severity_{s}": 0.9 - 0.1 * s + 0.02 * (number % 2) for s in range(1, 6)}}
        result["suites"]["corruption"]["tables"]["robustness"] = {"both": scores, "image": {**scores, "severity_5": None}}
        path.write_text(json.dumps(result))
    svg = page([folder]).pictures["figures/made-corruption.svg"]
    assert svg.count("<polyline") == 2, "a line for each cell; the pattern without a score at severity 5 has no panel"
    assert "severity" in svg
    assert [len(points.split()) for points in re.findall('polyline points="([^"]*)"', svg)] == [6, 6]


def test_one_run_has_no_interval(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", {"s": ["a"], "method": ["one", "two"]}, lambda *_: 0.5, seeds=[0])
    examined(folder, {"one": [{"robustness": 0.5}], "two": [{"robustness": 0.75}]})
    text = "\n".join(page([folder]).lines)
    assert [row[2] for row in rows_of(text, "corruption: key figures")[1:]] == ["50.0", "75.0"]
    assert [row[2] for row in rows_of(text, "corruption: points above one")[1:]] == ["+25.0"]


@pytest.mark.parametrize("suite", ALL)
def test_key_figures_are_figures_of_the_suites(suite: str) -> None:
    """Every table, row and column that is looked up is written by the suite's own file."""
    source = (Path(suites_folder.__file__).parent / f"{suite.replace('-', '_')}.py").read_text()
    for table, row, column in KEY_FIGURES[suite].values():
        assert f'"{table}"' in source
        assert row in ("both", "image", "text") or f'"{row}"' in source
        assert f'"{column}"' in source


@pytest.mark.parametrize("findings", [{"tables": []}, {"tables": {"t": 5}}, {"tables": {"t": {"row": 0.5}}}, [], {}, "text"])
def test_findings_of_another_shape_are_refused(tmp_path: Path, findings: object) -> None:
    folder = make_sweep(tmp_path / "made", {"scenario": ["α", "β"], "method": ["fedavg"]}, lambda *_: 0.5)
    path = sorted(folder.glob("federated-*/result.json"))[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"suites": {"corruption": findings}}))
    with pytest.raises(RunError, match="a file is not as a run writes it"):
        page([folder])
