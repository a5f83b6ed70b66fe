"""Completion in the shell: what is offered after what."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from commands import COMMAND


def completed(words: str) -> list[str]:
    """What bash is offered where the line ends."""
    parts = f"fedmllm {words}".split(" ")
    environment = {"_FEDMLLM_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(parts), "COMP_CWORD": str(len(parts) - 1)}
    done = CliRunner().invoke(COMMAND, [], prog_name="fedmllm", env=environment)
    return [line for line in done.output.split("\n") if line]


def test_commands_files_runs_and_kinds_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.toml", "b.jsonl", "folder/c.toml", "runs/one/meta.json", "runs/two/result.json", "runs/other/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert completed("swe") == ["sweep"]
    assert completed("run ") == ["quickstart", "a.toml"]
    assert completed("check folder/") == ["folder/c.toml"]
    assert completed("run b") == [], "the shell's own completion of files"
    assert completed("run nowhere/") == []
    assert completed("baseline loc") == ["local"]
    assert completed("baseline local q") == ["quickstart"]
    assert completed("predict ") == completed("eval ") == completed("compare runs/") == ["runs/one", "runs/two"]
    assert completed("report runs/one runs/t") == ["runs/two"]
    assert completed("list sui") == ["suites"]


def test_keys_of_settings_are_completed() -> None:
    assert {"seed=", "train.", "algorithm."} <= set(completed("run quickstart --set "))
    assert completed("run quickstart --set train.rou") == ["train.rounds="]
    assert completed("sweep grid.toml --set algorithm.") == ["algorithm.name="]
    assert completed("sweep grid.toml --set nothing") == []


def test_completion_can_be_installed() -> None:
    assert {"--install-completion", "--show-completion"} <= {name for option in COMMAND.params for name in option.opts}
