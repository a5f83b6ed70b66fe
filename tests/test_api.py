"""The Python API, and the notebook of docs/api.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedmllm
from commands import call, run
from fedmllm.errors import ConfigError, RunError

Write = Callable[..., Path]
PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)
    shown = capsys.readouterr().out
    assert "points above the untrained model" in shown
    assert (tmp_path / "runs" / "quickstart-federated-seed0" / "result.json").is_file()


def test_overrides_are_nested_or_dotted(write_experiment: Write) -> None:
    file = write_experiment()
    nested = fedmllm.load(file, seed=3, train={"rounds": 5, "lr": 0.1})
    assert (nested.seed, nested.train.rounds, nested.train.lr) == (3, 5, 0.1)
    assert nested == fedmllm.load(file, **{"seed": 3, "train.rounds": 5, "train.lr": 0.1})
    assert fedmllm.load(file, scenario={"name": "cross"}).scenario.options == {"image_clients": 0.5}
    with pytest.raises(ConfigError, match="did you mean 'rounds'"):
        fedmllm.load(file, **{"train.round": 5})


def test_a_run_is_that_of_the_command_line(write_experiment: Write, tmp_path: Path) -> None:
    file = write_experiment(rounds=1)
    result = fedmllm.run(fedmllm.load(file), out=tmp_path / "api")
    assert result.json["adapter_sha256"] == run("run", file, "--out", tmp_path / "cli")["adapter_sha256"]
    assert result.path == tmp_path / "api"
    with pytest.raises(RunError, match="is not empty"):
        fedmllm.run(fedmllm.load(file), out=tmp_path / "api")
    again = fedmllm.run(fedmllm.load(file), out=tmp_path / "api", resume=True)
    assert again.metrics == result.metrics


def test_a_run_reports_its_progress(write_experiment: Write, tmp_path: Path) -> None:
    stages = []
    fedmllm.run(
        fedmllm.load(write_experiment(rounds=1)), "zero-shot", tmp_path / "run", progress=lambda *at: stages.append(at[0])
    )
    assert "loading the model" in stages


def test_the_quickstart_ships_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fedmllm.load("quickstart").name == "quickstart"
    assert run("partition", "quickstart", "--set", "task.train_samples=40")["clients"]
    (tmp_path / "quickstart").write_text("x = 1")
    assert "unknown key" in call("check", "quickstart").stderr, "a file of that name comes first"


def test_what_is_public() -> None:
    assert set(fedmllm.__all__) == {"Model", "Result", "__version__", "load", "run"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fedmllm.nothing  # noqa: B018
