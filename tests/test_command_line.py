"""The boundary of the command line: messages on one line, output that nobody reads, paths, and commands that do not exist."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from commands import call
from fedmllm.cli.experiments import _evaluation_settings
from fedmllm.cli.output import OutputLost, print_result, print_table
from fedmllm.config import parse_override
from fedmllm.errors import RunError, printable
from fedmllm.progress import no_progress
from fedmllm.storage.atomic import check_folder
from made_runs import make_sweep

TASK = {"name": "pocket-memes", "n": 800, "test": 500, "test_samples": 100, "companion": {"name": "shapes-qa"}}


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("data\new\train.jsonl", r"data\new\train.jsonl"),
        ("\x1b[31mred\x07\x9b", r"\x1b[31mred\x07\x9b"),
        ("a\u2028b\u202ec\r\n", r"a\u2028b\u202ec\r\n"),
        ("\udcff", r"\udcff"),
        (r"C:\new α = 0.5 是的 👨‍👩‍👧", r"C:\new α = 0.5 是的 👨‍👩‍👧"),
    ],
)
def test_control_characters_are_escaped_and_nothing_else_is(message: str, expected: str) -> None:
    assert printable(message) == expected
    assert printable(printable(message)) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('task.train="data\\new\\train.jsonl"',
         r"--set task.train: 'data\new\train.jsonl' contains the control character '\n'; write paths with / or in 'single "),
        ("task.name=sha\npes", r"--set task.name: 'sha\npes' contains the control character '\n'; write paths with"),
        ("name=nan", "--set name: must be text, which is written in quotes (with --set in two kinds: key='\"text\"'), got "),
        ("eval.patterns=both", """--set eval.patterns: must be a list, written as ["both"], got 'both'."""),
        ("train.ruonds=3", "--set train.ruonds: unknown key; did you mean 'rounds'?"),
        ("task.naem=3", "--set task.naem: unknown key for task 'easy-vqa'; none exist."),
        ("train.lr=1e308", "--set train.lr: must be at most 100, because training diverges far below that, got 1e+308."),
        (f"name={'x' * 300}", "--set name: must have at most 200 bytes, because a file's name has at most 255, got 'xxx"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_one_line_that_blames_it(setting: str, message: str) -> None:
    done = call("check", "quickstart", "--set", setting)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("wrong", ["runn", "rn", "comparr"])
def test_the_command_that_was_meant_is_suggested_once(wrong: str) -> None:
    done = call(wrong)
    assert done.exit_code == 2
    assert done.stderr.count("Did you mean") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "quickstart", "--out", "file/run"],
        ["baseline", "local", "quickstart", "--out", "file/a/b"],
        ["sweep", "grid.toml", "--out", "file/grid"],
        ["partition", "quickstart", "--out", "file/manifest.parquet"],
        ["partition", "quickstart", "--plot", "file/page.html"],
        ["report", "grid", "--out", "file/page.md"],
        ["pack", "grid", "--to", "file/grid.tar.xz"],
    ],
)
def test_nothing_can_be_written_below_a_file(arguments: list[str]) -> None:
    Path("file").write_text("kept")
    Path("grid.toml").write_text('name = "grid"\nbase = "base.toml"')
    Path("base.toml").write_text('[task]\nname = "easy-vqa"')
    done = call(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: nothing can be written to file")
    assert done.stderr.endswith(", because file is a file; choose another folder.\n")
    assert Path("file").read_text() == "kept"


def test_folders_that_cannot_be_made_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(Path("new/deeper"))
    check_folder(tmp_path)
    with pytest.raises(RunError, match=r"has at most 255 bytes"):
        check_folder(Path("runs") / ("x" * 300))
    with pytest.raises(RunError, match=r"has at most 255 bytes"):
        check_folder(Path("é" * 128) / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RunError, match=r"to new, because this user may not write to \."):
        check_folder(Path("new"))


def test_a_directory_given_twice_is_refused() -> None:
    Path("runs/a").mkdir(parents=True)
    done = call("compare", "runs/a", "runs/b", "runs/../runs/a")
    assert done.exit_code == 2
    assert "runs/a and runs/../runs/a are the same directory; give it once." in done.stderr


# Output that nobody reads


@pytest.mark.parametrize(
    ("redirection", "status"), [(">&-", 0), ("> /dev/full", 1), ("| sleep 0", 0)], ids=["closed", "disk full", "broken pipe"]
)
def test_a_command_whose_output_is_lost_says_that_it_is_complete(redirection: str, status: int) -> None:
    axes = {"setting": ["A", "B"], "method": ["x", "y"]}
    folder = make_sweep(Path("grid"), axes, lambda cell, seed, pattern: 0.5, seeds=[0])
    command = f"{sys.executable} -m fedmllm pack {folder} --to packed.tar.xz {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert Path("packed.tar.xz").is_file()
    assert done.returncode == status
    assert done.stderr.startswith("note: standard output cannot be written (")
    assert done.stderr.endswith("), but the archive is in packed.tar.xz\n")
    assert len(done.stderr.splitlines()) == 1


def test_a_run_whose_output_is_lost_names_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(OutputLost) as lost:
        print_result({"metrics": {}}, Path("runs/a"), as_json=True)
    assert lost.value.closed
    assert lost.value.done == "the run is complete, and its result is in runs/a/result.json"
    with pytest.raises(OutputLost):
        print_table(Table("a table"))


def test_a_check_goes_on_without_output(write_experiment: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: object) -> None:
        raise OutputLost("it is closed", closed=True)

    for function in ("show", "print_json"):
        monkeypatch.setattr(f"fedmllm.cli.checking.{function}", lost)
    file = write_experiment()
    for options in ([], ["--json"]):
        refused = call("check", file, "--set", "partition.clients=31", *options)
        assert refused.exit_code == 2
        assert refused.stderr.startswith("error: partition.clients = 31")
        accepted = call("check", file, *options)
        assert accepted.exit_code == 0
        assert accepted.stderr.endswith("note: standard output cannot be written (it is closed)\n")


def test_closed_streams_are_replaced_before_a_file_takes_their_number() -> None:
    script = "import os; from fedmllm.cli.output import fill_closed_streams as f; f(); print(os.open('x', os.O_CREAT))"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{script}" <&- 2>&-'], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) == 3


# Testing a finished run again


@pytest.mark.parametrize(
    ("settings", "task", "dropped"),
    [
        (["task.name=shapes-qa", "task.test=7"], {"name": "shapes-qa", "test": 7},
         ["task.companion", "task.n", "task.test", "task.test_samples"]),
        (["task={name='shapes-qa', test=7}"], {"name": "shapes-qa", "test": 7},
         ["task.companion", "task.n", "task.test", "task.test_samples"]),
        (["task.name=jsonl", "task.train=a", "task.test=b"], {"name": "jsonl", "train": "a", "test": "b"},
         ["task.companion", "task.n", "task.test", "task.test_samples"]),
        (["task.name=pocket-memes", "task.n=9"], {**TASK, "n": 9}, []),
        (["task.test=9", "eval.patterns=['text']"], {**TASK, "test": 9}, []),
    ],
)  # fmt: skip
def test_another_task_keeps_nothing_of_the_runs_own(settings: list[str], task: dict[str, Any], dropped: list[str]) -> None:
    parsed, notes = [parse_override(setting) for setting in settings], list[str]()
    raw = _evaluation_settings({"task": {**TASK}, "eval": {}}, parsed, lambda stage, done, total, note: notes.append(note))
    assert raw["task"] == task
    assert sorted(note.split(" ")[0] for note in notes) == dropped


def test_settings_of_training_cannot_be_changed_afterwards() -> None:
    for setting in ("train.lr=1", "model={name='pocket'}", "seed=1"):
        with pytest.raises(RunError, match=r"only \[task\], \[eval\] and \[prompt\] can be set"):
            _evaluation_settings({"task": {**TASK}}, [parse_override(setting)], no_progress)
