"""Whole runs that are killed, interrupted or stopped by an error, and resumed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from commands import call, forked, run
from fedmllm.storage import checkpoint
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_round(after: int, when: str) -> None:
    """From here on this process is killed in that round, when its record and checkpoint are written or before."""
    save = RunDir.save_round

    def save_and_die(self: RunDir, record: Mapping[str, Any], state: State, digest: str) -> None:
        if record["round"] == after and when == "between record and checkpoint":
            checkpoint.save_state = die  # type: ignore[assignment]
        save(self, record, state, digest)
        if record["round"] == after:
            if when == "written":
                self.rounds()
            die()

    RunDir.save_round = save_and_die  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    """The result of the experiment that is killed below; filled by the first test that has its file."""
    return {}


@pytest.mark.parametrize(
    ("after", "when"), [(0, "written"), (1, "written"), (1, "being written"), (1, "between record and checkpoint")]
)
def test_killed_and_resumed_equals_uninterrupted(
    write_experiment: Write, uninterrupted: dict[str, Any], after: int, when: str
) -> None:
    file = write_experiment(name="killed")
    whole = uninterrupted or run("run", file, "--out", "whole")
    uninterrupted.update(whole)
    with forked(Path("stderr"), "run", file, prepare=partial(die_in_round, after, when)) as process:
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    folder = RunDir(Path("runs/killed-federated-seed0"))
    assert not folder.complete
    assert len(folder.rounds()) in ((after + 1,) if when == "written" else (after, after + 1))
    resumed = run("run", file, "--resume")
    assert folder.complete
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["bytes_up"] == whole["bytes_up"]
    assert run("run", file, "--out", folder.path, "--resume") == resumed


def test_interrupted_is_130_and_resumable(write_experiment: Write) -> None:
    file = write_experiment(rounds=200, name="stopped")
    folder, deadline = RunDir(Path("stopped")), time.monotonic() + 120
    with forked(Path("stderr"), "run", file, "--out", "stopped") as process:
        while folder.load_checkpoint() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 130
    stderr = Path("stderr").read_text()
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert folder.load_checkpoint() is not None


def test_local_goes_on_with_the_client_it_was_at(write_experiment: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_experiment()
    whole = run("baseline", "local", file, "--out", "whole")
    save = RunDir.save_part

    def save_then_fail(self: RunDir, name: str, value: dict[str, Any]) -> None:
        save(self, name, value)
        if name == "client-1":
            raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save_part", save_then_fail)
        failed = call("baseline", "local", file)
    assert failed.exit_code == 1
    assert "the disk is full" in failed.stderr
    assert run("baseline", "local", file, "--resume")["metrics"] == whole["metrics"]


def test_resume_refuses_another_experiment(write_experiment: Write) -> None:
    file = write_experiment(rounds=1)
    run("run", file, "--out", "a")
    done = call("run", file, "--out", "a", "--resume", "--set", "seed=4")
    assert done.exit_code == 2
    assert "another experiment's run" in done.stderr
