"""What is shown and logged while something takes long: which calls become lines, the bars, and `run.log`."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedmllm
from commands import COMMAND, call
from fedmllm import progress
from fedmllm.errors import ConfigError
from fedmllm.evaluation.test_set import TestSet
from fedmllm.models.mllm import MLLM
from fedmllm.progress import Lines, ProgressCallback, RunLog, TimeLeft, clock, no_progress
from fedmllm.runs.progress import ProgressBars
from fedmllm.training.cohort import _Cohort
from fedmllm.training.meter import clients_named


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, that the test sets."""
    time = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: time[0])
    return time


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)


# Lines


def test_a_round_is_a_line_and_a_step_is_one_in_ten_seconds(now: list[float]) -> None:
    lines: list[str] = []
    told = Lines(lambda stage, line: lines.append(line))
    told("loading the model", 0, 0, "pocket")
    told("rounds", 0, 2, "")
    for done in range(1, 101):
        now[0] += 0.25
        told("training", done, 100, "client 3")
    told("rounds", 1, 2, "loss 1.0")
    for done in range(1, 101):
        now[0] += 0.25
        told("testing", done, 100, "")
    told("rounds", 2, 2, "loss 0.5")
    assert lines == [
        "loading the model: pocket", "training 40/100: client 3  0:15 left", "training 80/100: client 3  0:05 left",
        "rounds 1/2: loss 1.0  0:25 left", "testing 40/100  0:15 left", "testing 80/100  0:05 left", "rounds 2/2: loss 0.5",
    ]  # fmt: skip


def test_the_time_that_is_left(now: list[float]) -> None:
    left = TimeLeft()
    assert left("rounds", 5, 20) is None, "resumed after five rounds"
    now[0] = 10.0
    assert left("rounds", 7, 20) == 65.0
    assert left("rounds", 0, 20) is None, "it began anew"
    now[0] = 14.0
    assert left("rounds", 4, 20) == 16.0
    assert [clock(seconds) for seconds in (0.4, 59.6, 754, 11_100)] == ["0:00", "1:00", "12:34", "3:05:00"]


def test_the_clients_of_a_pass_are_named() -> None:
    assert clients_named([3]) == "client 3"
    assert clients_named([3, 5]) == "clients 3, 5"
    assert clients_named(range(10)) == "clients 0, 1, 2 and 7 more"


# The log of a run


def test_a_log_has_every_line_and_the_error_that_ended_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fedmllm")
    shown: list[str] = []
    log, path = RunLog(lambda stage, done, total, note: shown.append(stage)), tmp_path / "run.log"
    log("note", 0, 0, "before there is a folder: \x1b[2J\nforged")
    with log.kept_in(path):
        log("detail", 0, 0, "cpu")
        log("training", 1, 2, "client 3")
    with pytest.raises(ConfigError), log.kept_in(path):
        raise ConfigError("seed = x: must be a number.")
    with pytest.raises(ZeroDivisionError), log.kept_in(path):
        1 / 0  # noqa: B018
    with pytest.raises(KeyboardInterrupt), log.kept_in(path):
        raise KeyboardInterrupt
    times, lines = zip(*(line.split(" ", 1) for line in path.read_text().splitlines()), strict=True)
    assert lines[:-2] == (
        "note: before there is a folder: \\x1b[2J\\nforged",
        "detail: cpu",
        "error: seed = x: must be a number.",
    )
    assert re.fullmatch(r"failed: ZeroDivisionError: division by zero \(test_progress.py, line \d+\)", lines[-2])
    assert lines[-1] == "interrupted"
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", time) for time in times)
    assert tuple(caplog.messages) == lines
    assert [record.levelname for record in caplog.records] == ["INFO", "DEBUG", "ERROR", "ERROR", "ERROR"]
    assert shown == ["note", "detail", "training"]


def test_a_library_user_sees_nothing_without_asking(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not progress.LOGGER.handlers
    monkeypatch.setattr(progress.LOGGER, "propagate", False)  # to the handlers of pytest
    with pytest.raises(ConfigError), RunLog(no_progress).kept_in(Path(os.devnull)):
        raise ConfigError("bad")
    assert capfd.readouterr() == ("", "")


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe", "missing/run.log"):
        notes: list[str] = []
        log = RunLog(lambda stage, done, total, note, notes=notes: notes.append(note))
        with log.kept_in(tmp_path / name):
            log("rounds", 1, 2, "loss")
        assert re.fullmatch(rf"{tmp_path / name} cannot be written \(.+\); the run goes on without it", notes[0])
        assert notes[1:] == ["loss"]
    assert (tmp_path / "mine").read_text() == "mine"
    log = RunLog(no_progress)
    with log.kept_in(tmp_path / "run.log"):
        log("rounds", 1, 2, "loss")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda file, content: os.pread(-1, 1, 0))  # OSError
            log("rounds", 2, 2, "loss")
        log("note", 0, 0, "space again")
    assert (tmp_path / "run.log").read_text().count("\n") == 1


# On a terminal


def test_bars_of_steps_come_late_and_go_when_full(terminal: None, now: list[float]) -> None:
    bars = ProgressBars()

    def visible() -> list[str]:
        return [str(cell) for cell in bars._bars.make_tasks_table(bars._bars.tasks).columns[0]._cells]

    bars("loading the model", 0, 0, "pocket")
    assert visible() == ["loading the model"]
    bars("rounds", 0, 2, "")
    bars("training", 0, 10, "client 3")
    assert visible() == ["rounds"]
    now[0] += 2.0
    assert visible() == ["rounds", "training"], "however long the first step takes"
    bars("training", 10, 10, "client 3")
    assert visible() == ["rounds"]
    bars("rounds", 1, 2, "loss 1.0")
    bars("training", 1, 10, "client 4")
    now[0] += 1.0
    bars("training", 2, 10, "client 4")
    assert visible() == ["rounds", "training"]
    rendered = {task.description: [str(column(task)) for column in bars._bars.columns[2:]] for task in bars._bars.tasks}
    assert rendered["training"] == ["2/10", "0:08 left", "client 4"]
    assert rendered["rounds"][:2] == ["1/2", "0:01 left"]


def test_bars_leave_standard_output_alone(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars() as bars:
        bars("rounds", 1, 2, "loss")
        print("the result")
        bars("note", 0, 0, "[red]a note")
    printed = capsys.readouterr()
    assert printed.out == "the result\n"
    assert "note: [red]a note" in printed.err


@pytest.mark.parametrize("live", [True, False])
def test_quiet_shows_nothing_and_verbose_details(
    live: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: live, raising=False)
    for verbose, lines in ((False, 0), (None, 1), (True, 2)):
        bars = ProgressBars(verbose)
        for stage in ("note", "detail"):
            bars(stage, 0, 0, "text")
        assert capsys.readouterr().err.count(": text") == lines


def test_every_command_that_works_for_long_can_be_quiet() -> None:
    commands: dict[str, Any] = COMMAND.commands  # type: ignore[attr-defined]
    options = {name: {o for p in command.params for o in (*p.opts, *p.secondary_opts)} for name, command in commands.items()}
    long = "run baseline check partition eval predict export sweep report pack doctor server"
    assert {name for name, of_command in options.items() if {"--quiet", "-q", "--verbose", "-v"} <= of_command} == set(
        long.split()
    )


def test_the_command_line_shows_as_much_as_it_is_asked(
    write_experiment: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: Any, progress: ProgressCallback, **options: Any) -> None:
        progress("rounds", 1, 2, "loss 1.0")
        progress("detail", 0, 0, "cpu")
        raise ConfigError("stop")

    monkeypatch.setattr("fedmllm.api.run", run)
    command = "run", write_experiment(), "--set", "task={name='easy-vqa'}"
    usual = call(*command).stderr.splitlines()
    assert usual[0].startswith("note: ")
    assert usual[-2:] == ["rounds 1/2: loss 1.0", "error: stop"]
    assert call(*command, "--quiet").stderr.splitlines() == ["error: stop"]
    assert call(*command, "-v").stderr.splitlines() == [*usual[:-1], "detail: cpu", "error: stop"]


# Nothing is silent for long


def test_every_step_and_batch_of_a_run_is_told(
    write_experiment: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a step or batch takes: no two of them pass without a call in between."""
    events: list[str] = []

    def counted(owner: type, method: str) -> None:
        original = getattr(owner, method)

        def observed(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            events.append(method)
            return result

        monkeypatch.setattr(owner, method, observed)

    for owner, method in ((_Cohort, "_step"), (TestSet, "_in_parts"), (MLLM, "encode_one"), (MLLM, "prepare_features")):
        counted(owner, method)
    overrides = {"train.cohort": 1, "eval.batch_size": 4, "eval.every": 1, "train.epochs": 2}
    result = fedmllm.run(
        fedmllm.load(write_experiment(rounds=2), **overrides),
        out=tmp_path / "run",
        progress=lambda stage, done, total, note: events.append(f"call {stage}"),
    )
    assert {"_step", "_in_parts", "encode_one", "prepare_features"} <= set(events)
    gaps = [
        len(list(group)) for called, group in itertools.groupby(events, lambda event: event.startswith("call")) if not called
    ]
    assert max(gaps) == 1
    told = {event.removeprefix("call ") for event in events if event.startswith("call")}
    assert {"rounds", "clients", "training", "testing", "encoding samples", "encoding questions", "encoding pictures"} <= told
    lines = (result.path / "run.log").read_text().splitlines()
    assert [line.split(" ", 1)[1].split(":")[0] for line in lines if "rounds " in line] == ["rounds 1/2", "rounds 2/2"]
    assert any(line.endswith(f"the files of the run are in {tmp_path / 'run'}") for line in lines)
