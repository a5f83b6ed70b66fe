"""The commands that read other people's folders, on a sweep with one wrong file: status 0 or 2 and one sentence, no traceback.

`make fuzz` tries more cases, with another seed each time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

import made_files as made
from commands import call
from fedmllm.errors import RunError
from fedmllm.runs import reevaluate, tracking
from test_fuzz_files import check_sentence, files_in, restored

METHODS = {"zero-shot": "zero-shot", "local": "local", "FedAvg": "federated", "FedProx": "federated"}


def _index() -> dict[str, Any]:
    cells = []
    for method, kind in METHODS.items():
        for seed in (0, 1):
            name = "zero-shot" if kind == "zero-shot" else f"{method}-{seed}"
            axes = {"place": "β = 0.3", "method": method}
            cells.append({"axes": axes, "seed": seed, "kind": kind, "id": name, "state": "complete"})
    return {"schema": 1, "name": "made", "axes": ["place", "method"], "cells": cells, "margin": 2.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with a sweep in `grid`. The runs of FedProx have no resampled scores, as of an earlier version."""
    root = tmp_path_factory.mktemp("world")
    for split in ("train", "test"):
        (root / f"{split}.jsonl").write_bytes(made.as_lines([line for line in made.SAMPLES if "image" not in line]))
    (root / "sweep.toml").write_bytes(made.as_toml({"name": "made", "base": "experiment.toml"}))
    (root / "experiment.toml").write_bytes(made.as_toml({"task": made.TASKS[0]}))
    (root / "grid").mkdir()
    (root / "grid" / "sweep.json").write_bytes(made.as_json(_index()))
    for cell in _index()["cells"]:
        folder = root / "grid" / cell["id"]
        folder.mkdir(exist_ok=True)
        result = copy.deepcopy(made.RESULT) | {"kind": cell["kind"], "seed": cell["seed"]}
        result["metrics"]["both"]["accuracy"] = 0.3 + len(cell["id"]) / 40 + cell["seed"] / 20
        if "FedProx" in cell["id"]:
            result = {key: value for key, value in result.items() if key not in ("bootstrap_scores", "test_digest")}
        (folder / "result.json").write_bytes(made.as_json(result))
        (folder / "rounds.jsonl").write_bytes(made.as_lines(made.ROUNDS))
        (folder / "predictions.jsonl").write_bytes(made.as_lines(made.PREDICTIONS))
        (folder / "config.toml").write_bytes(made.as_toml(made.CONFIG))
        (folder / "meta.json").write_bytes(made.as_json(made.META))

    def stop(*_: object) -> None:
        raise RunError("the model would be loaded here.")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(reevaluate, "Session", stop)
        patch.setattr(tracking, "_begin", lambda *_: MagicMock())
        yield root


RESULTS = st.just(made.RESULT)
FILES: dict[str, SearchStrategy[bytes]] = {
    "sweep.json": made.cases(st.just(_index()), made.as_json),
    "FedAvg-0/result.json": made.cases(RESULTS, made.as_json),
    "local-1/result.json": made.cases(RESULTS.map(lambda result: result | {"kind": "local"}), made.as_json),
    "FedProx-1/result.json": made.cases(
        RESULTS.map(lambda result: {key: result[key] for key in result if key not in ("bootstrap_scores", "test_digest")}),
        made.as_json,
    ),
    "FedAvg-1/rounds.jsonl": made.cases(st.just(made.ROUNDS), made.as_lines),
    "FedProx-0/predictions.jsonl": made.cases(st.just(made.PREDICTIONS), made.as_lines),
    "FedAvg-0/config.toml": made.cases(st.just(made.CONFIG), made.as_toml),
    "FedAvg-0/meta.json": made.cases(st.just(made.META), made.as_json),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "compare": ("compare", "grid", "--baseline", "zero-shot"),
    "compare as JSON": ("compare", "grid", "--baseline", "FedProx", "--json"),
    "compare by pattern": ("compare", "grid", "--by-pattern"),
    "compare runs": ("compare", "grid/FedAvg-0", "grid/FedProx-1", "grid/local-1", "--baseline", "grid/FedAvg-0"),
    "report": ("report", "grid", "--out", "../page.md"),
    "report as HTML": ("report", "grid", "grid/FedAvg-0", "grid/FedProx-0", "--out", "../page.html"),
    "sweep": ("sweep", "sweep.toml", "--dry-run", "--pilot", "grid", "--baseline", "FedAvg", "--effect", "10"),
    "track": ("track", "grid/FedAvg-0", "grid/FedAvg-1", "grid/local-1"),
    "eval": ("eval", "grid/FedAvg-0", "--patterns", "both,text"),
}


@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=settings.default.max_examples // 2)
@given(data=st.data())
def test_a_command_works_or_refuses(command: str, world: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from([name for name in FILES if command != "eval" or name.startswith("FedAvg-0")]))
    content = data.draw(FILES[file])
    with restored(world / "grid" / file, content):
        before = files_in(world)
        check(command)
        assert files_in(world) == before


def check(command: str, status: tuple[int, ...] = (0, 2)) -> None:
    done = call(*COMMANDS[command])
    assert done.exit_code in status, done.output
    assert "Traceback" not in done.output
    lines = done.stderr.split("\n")[:-1]
    if done.exit_code == 2:
        assert lines.pop().startswith("error: ")
    assert all(line.startswith(("error: ", "note: ")) for line in lines)
    for line in lines:
        check_sentence(line)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_whole_folder_is_taken(command: str, world: Path) -> None:
    """Otherwise the cases would test the first check alone."""
    check(command, (2,) if command == "eval" else (0,))
    if command == "eval":
        assert "the model would be loaded here" in call(*COMMANDS[command]).stderr
