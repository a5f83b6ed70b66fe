"""`fedmllm init` writes a folder that runs; `fedmllm doctor` looks at the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedmllm
from fedmllm import api
from fedmllm.cli import doctor
from fedmllm.cli.app import app
from fedmllm.experiment.parts import build
from fedmllm.progress import ProgressCallback


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.parametrize(("kind", "patterns"), [("classification", {"image", "text"}), ("qa", {"image", "text"})])
def test_the_starter_is_a_valid_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, patterns: set[str]
) -> None:
    result = invoke("init", tmp_path / "start", "--task", kind)
    assert result.exit_code == 0, result.output
    monkeypatch.chdir(tmp_path / "start")
    dataset = build(api.load("experiment.toml")).prepare()
    assert (len(dataset.train), len(dataset.test), dataset.skipped) == (120, 60, 0)
    shown = {modality for sample in dataset.test for modality in sample.modalities}
    assert shown == patterns
    assert {path.suffix for path in Path("pictures").iterdir()} == {".png"}
    assert {path.name for path in Path().iterdir()} == {"README.md", "experiment.toml", "pictures", "test.jsonl", "train.jsonl"}


def test_the_starter_runs(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke("init", tmp_path / "start")
    monkeypatch.chdir(tmp_path / "start")
    smaller = ["train.rounds=1", "train.clients_per_round=1", f"model.name={json.dumps(str(tiny))}"]
    result = invoke("run", "experiment.toml", *(word for setting in smaller for word in ("--set", setting)))
    assert result.exit_code == 0, result.output
    asks = json.loads(Path("runs/my-memes-federated-seed0/result.json").read_text())["asks"]
    assert asks == {"question": "does the picture show what the text says?", "choices": ["no", "yes"], "lettered": True}
    answer = invoke("predict", "runs/my-memes-federated-seed0", "--text", "A red object.", "--trust-config")
    assert answer.stdout.splitlines()[0] in ("no", "yes")


def test_the_starter_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = invoke("init", tmp_path)
    assert (result.exit_code, "is not empty; give a new folder" in result.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    result = invoke("init", tmp_path / "mine.txt")
    assert result.exit_code == 2
    result = invoke("init", tmp_path / "mine.txt" / "x")
    assert (result.exit_code, "cannot be created" in result.stderr) == (2, True)


def test_the_doctor_looks_at_versions_extras_and_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        metrics = {"both": {"n": 30}}  # noqa: RUF012 (read only)

    def run(experiment: object, out: Path, progress: ProgressCallback) -> Done:
        progress("rounds", 1, 1, "loss 1.0")
        progress("note", 0, 0, "the scores are low")
        return Done()

    monkeypatch.setattr(api, "run", run)
    result = invoke("doctor", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    rows = {row["what"]: row for row in report["rows"]}
    assert rows["fedmllm"]["value"] == fedmllm.__version__
    assert rows["extra flower"]["value"] == "installed"
    assert "extra dev" not in rows
    assert rows["self-test"]["note"] == "one round, 30 questions answered"
    shown = invoke("doctor")
    assert "All is well." in shown.stdout
    assert "rounds 1/1: loss 1.0" in shown.stderr
    assert "the scores are low" not in shown.stderr


def test_the_doctor_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(experiment: Any, out: Path, progress: Any) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(api, "run", broken)
    monkeypatch.setattr(doctor, "_installed", lambda name: name != "flwr")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDMLLM_CACHE", str(tmp_path / "file"))
    result = invoke("doctor", "--json")
    assert result.exit_code == 1
    rows = {row["what"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows["self-test"]["note"] == "RuntimeError: no kernel image is available"
    assert rows["extra flower"] == {
        "what": "extra flower", "value": "without flwr", "note": 'pip install "fedmllm[flower]" if you need it', "fine": True,
    }  # fmt: skip
    assert not rows["cache"]["fine"]
    assert "Something is wrong" in invoke("doctor").stdout
