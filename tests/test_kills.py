"""Runs that are killed at twenty random instants and resumed end like one that was not; test_runs kills at chosen instants."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import forked
from fedmllm.storage.run_dir import RunDir

KILLS = 20
METHODS = {"run": ("run",), "local": ("baseline", "local")}
PARTS = ("--set", "algorithm.name=scaffold", "--set", "train.clients_per_round=3", "--set", "eval.every=2")


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, without what the clock and the machine say."""
    directory = RunDir(folder)
    result = {key: value for key, value in directory.result().items() if key not in ("seconds", "peak_memory_mb")}
    rounds = [{key: value for key, value in record.items() if key != "seconds"} for record in directory.rounds()]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {"result": result, "rounds": rounds, "predictions": directory.predictions(), "files": files}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_a_random_instant(
    write_experiment: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_experiment(rounds=6, name="killed")
    command = (*METHODS[method], file, *PARTS, "--resume", "--out")

    def exit_code(folder: Path, seconds: float) -> int | None:
        """That of the command, which is killed after so many seconds unless it has ended."""
        with forked(Path("stderr"), *command, folder) as process:
            process.join(seconds)
            process.kill()
            process.join()
            return process.exitcode

    assert exit_code(Path("first"), 300) == 0, Path("stderr").read_text()  # the server that forks has its libraries now
    began = time.monotonic()
    assert exit_code(Path("whole"), 300) == 0
    whole, usual, kills, runs = outcome(Path("whole")), time.monotonic() - began, 0, 0
    while kills < KILLS // len(METHODS):
        folder, instants, runs = Path(f"killed-{runs}"), list[float](), runs + 1
        while (status := exit_code(folder, (instant := 1.2 * usual * random.random()))) != 0:
            assert status == -signal.SIGKILL, Path("stderr").read_text()
            instants.append(round(instant, 3))
        kills += len(instants)
        resumed = outcome(folder)
        for part, value in whole.items():
            assert resumed[part] == value, f"killed after {instants} s, of {usual:.3f} s that it takes: other {part}"
