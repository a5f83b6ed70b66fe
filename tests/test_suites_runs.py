"""Suites on a real model: at the end of a run, by `fedmllm eval`, and in the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import call, run
from fedmllm.data.prompts import Conversation
from fedmllm.errors import RunError
from fedmllm.models.mllm import MLLM
from fedmllm.report.writeup import page
from helpers import png
from made_runs import make_sweep

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
        assert [sample.picture for sample in encoded] == [1, 0]
    (other,) = model.encode([talk], [png((200, 210, 250))], 300)
    assert other.picture == 1, "its number is free again"
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


@pytest.mark.parametrize("findings", [{"tables": []}, {"tables": {"t": 5}}, {"tables": {"t": {"row": 0.5}}}, [], {}, "text"])
def test_findings_of_another_shape_are_refused(tmp_path: Path, findings: object) -> None:
    folder = make_sweep(tmp_path / "made", {"scenario": ["α", "β"], "method": ["fedavg"]}, lambda *_: 0.5)
    path = sorted(folder.glob("federated-*/result.json"))[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"suites": {"corruption": findings}}))
    with pytest.raises(RunError, match="a file is not as a run writes it"):
        page([folder])
