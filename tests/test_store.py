from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedmllm.errors import RunError
from fedmllm.storage import checkpoint as store
from fedmllm.storage.run_dir import RunDir, new_run, unfinished
from fedmllm.tensors import State
from helpers import same, tensors


def begun(path: Path, digest: str = "d", **meta: Any) -> RunDir:
    run = RunDir(path)
    run.begin('name = "x"\n', {"config_digest": digest, **meta})
    return run


def cut_off_in_round_1(path: Path) -> RunDir:
    """A run whose process was killed while it wrote the record of round 1."""
    run = begun(path)
    run.save_round({"round": 0}, {"adapter": tensors(x=0)}, "d")
    run.rounds()
    with (path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 1, "lo')
    return run


def test_the_constructor_does_not_touch_the_disk(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert not run.exists
    assert not run.complete
    assert run.rounds() == []
    assert run.load_checkpoint() is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_beginning_to_end(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", kind="federated")
    assert run.exists
    assert run.meta() == {"config_digest": "d", "kind": "federated"}
    assert run.config.read_text() == 'name = "x"\n'
    run.save_predictions([{"id": "a"}, {"id": "b"}])
    assert [json.loads(line)["id"] for line in (run.path / "predictions.jsonl").read_text().splitlines()] == ["a", "b"]
    assert not run.complete
    run.finish({"metrics": {"both": {"accuracy": 0.5}}})
    assert run.complete
    assert run.result() == {"metrics": {"both": {"accuracy": 0.5}}}


def _no_constants(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_nan_is_written_as_null_and_read_as_nan(tmp_path: Path) -> None:
    run, nan = begun(tmp_path), float("nan")
    metrics = {"both": {"auc": nan, "auc_ci": [nan, nan], "n": 3}}
    rows = [{"client": 0, "metrics": metrics}, {"client": 1}]
    run.finish({"positive": None, "adapter_sha256": None, "metrics": metrics, "per_client": rows, "rounds": 2})
    for number, loss in enumerate((nan, float("inf"), 0.5)):
        run.save_round({"round": number, "loss": loss, "metrics": metrics if number else {}}, {"adapter": tensors(x=0)}, "d")
    records = run.rounds()
    run.save_part("client-0", {"predictions": [{"score": None}], "rounds": [{"loss": nan}]})
    run.save_predictions([{"id": "a", "score": nan}, {"id": "b", "score": 0.5}])
    for file in ("result.json", "checkpoint/client-0.json"):
        json.loads((tmp_path / file).read_text(), parse_constant=_no_constants)
    for file in ("rounds.jsonl", "predictions.jsonl"):
        for line in (tmp_path / file).read_text().splitlines():
            json.loads(line, parse_constant=_no_constants)
    assert json.loads((tmp_path / "result.json").read_text())["metrics"] == {
        "both": {"auc": None, "auc_ci": [None, None], "n": 3}
    }

    result, part = run.result(), run.load_part("client-0")
    assert (result["positive"], result["adapter_sha256"], result["rounds"]) == (None, None, 2)
    for read in (result, result["per_client"][0], records[1], records[2]):
        both = read["metrics"]["both"]
        assert [math.isnan(value) for value in (both["auc"], *both["auc_ci"])] == [True] * 3
        assert both["n"] == 3
    assert [math.isnan(record["loss"]) for record in records] == [True, True, False]
    assert part is not None
    assert math.isnan(part["rounds"][0]["loss"])
    assert part["predictions"] == [{"score": None}]
    assert [line["score"] for line in run.predictions()] == [None, 0.5]


def test_a_kill_between_config_and_meta_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def killed_at_the_second(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr(os, "fsync", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        begun(tmp_path / "run")
    assert RunDir(tmp_path / "run").config.is_file()
    assert not RunDir(tmp_path / "run").exists


def test_the_checkpoint_holds_the_round_and_the_state(tmp_path: Path) -> None:
    run = begun(tmp_path)
    for number in range(3):
        run.save_round({"round": number, "loss": number / 2}, {"adapter": tensors(x=number), "m": tensors(x=-number)}, "d")
    assert [r["round"] for r in run.rounds()] == [0, 1, 2]
    loaded = run.load_checkpoint()
    assert loaded is not None
    assert loaded[0] == 3
    assert same(loaded[1], {"adapter": tensors(x=2), "m": tensors(x=-2)})


def test_a_repeated_round_replaces_its_record_and_all_later_ones(tmp_path: Path) -> None:
    run = begun(tmp_path)
    for number in (0, 1, 2):
        run.save_round({"round": number, "try": 1}, {"adapter": tensors(x=0)}, "d")
    run.save_round({"round": 1, "try": 2}, {"adapter": tensors(x=0)}, "d")
    assert run.rounds() == [{"round": 0, "try": 1}, {"round": 1, "try": 2}]


def test_rounds_are_written_in_the_background_and_failures_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller continues while a round is written; the round is on disk when the next one is saved."""
    run, gates = begun(tmp_path), {"1": threading.Event(), "2": threading.Event()}
    save = store.save_state

    def slow(path: Path, state: State, metadata: Mapping[str, str], previous: Path | None) -> None:
        assert gates[metadata["rounds_done"]].wait(20)
        save(path, state, metadata, previous)

    monkeypatch.setattr(store, "save_state", slow)
    run.save_round({"round": 0}, {"adapter": tensors(x=0)}, "d")  # returns although nothing is written yet
    assert not (tmp_path / "checkpoint" / "server.safetensors").exists()
    gates["1"].set()
    run.save_round({"round": 1}, {"adapter": tensors(x=1)}, "d")
    checkpoint = RunDir(tmp_path).load_checkpoint()
    assert checkpoint is not None
    assert checkpoint[0] == 1
    gates["2"].set()
    run.rounds()

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(store, "save_state", full)
    run.save_round({"round": 2}, {"adapter": tensors(x=2)}, "d")
    with pytest.raises(OSError, match="No space left"):
        run.save_round({"round": 3}, {"adapter": tensors(x=3)}, "d")
    checkpoint = RunDir(tmp_path).load_checkpoint()
    assert checkpoint is not None
    assert checkpoint[0] == 2


def test_new_rounds_are_appended(tmp_path: Path) -> None:
    """A file cut off by a kill is repaired first; after that, lines are appended."""
    cut_off_in_round_1(tmp_path)
    again = RunDir(tmp_path)
    for number in (1, 2, 3):
        again.save_round({"round": number}, {"adapter": tensors(x=0)}, "d")
    assert [r["round"] for r in again.rounds()] == [0, 1, 2, 3]
    assert (tmp_path / "rounds.jsonl").read_text().count("\n") == 4


def test_a_record_cut_by_a_kill_is_not_counted(tmp_path: Path) -> None:
    run = cut_off_in_round_1(tmp_path)
    assert run.rounds() == [{"round": 0}]


def test_parts_are_kept_for_resuming(tmp_path: Path) -> None:
    run = begun(tmp_path)
    assert run.load_part("client-3") is None
    run.save_part("client-3", {"score": 0.5})
    assert run.load_part("client-3") == {"score": 0.5}
    assert run.load_part("client-4") is None


def test_a_missing_result_is_explained(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run directory"):
        RunDir(tmp_path).result()
    run = begun(tmp_path)
    with pytest.raises(RunError, match=r"is not complete; continue it with `fedmllm run … --resume`"):
        run.result()
    (tmp_path / "result.json").write_text('{"cut')
    with pytest.raises(RunError, match=r"result\.json cannot be read .* delete it and give the run's command again"):
        run.result()


def test_a_new_run_gets_a_free_name(tmp_path: Path) -> None:
    assert new_run(tmp_path / "runs", "exp").path == tmp_path / "runs" / "exp"
    for taken in ("exp", "exp-2", "exp-4"):
        (tmp_path / taken).mkdir()
    assert new_run(tmp_path, "exp").path == tmp_path / "exp-3"


def test_runs_started_at_the_same_time_get_different_directories(tmp_path: Path) -> None:
    runs = [new_run(tmp_path, "exp") for _ in range(3)]
    assert list(tmp_path.iterdir()) == [], "a run that is not started leaves nothing"
    with runs[0].claimed(), runs[1].claimed():
        runs[0].begin("", {})
        assert {run.path.name for run in runs[:2]} == {"exp", "exp-2"}
        assert runs[1].adapter == tmp_path / "exp-2" / "adapter"
    with runs[2].claimed():
        assert runs[2].path.name == "exp-3"
    assert sorted(p.name for p in (tmp_path / "exp").iterdir()) == ["config.toml", "meta.json"]
    assert not list(tmp_path.rglob("run.lock"))


def test_two_processes_never_work_on_one_run(tmp_path: Path) -> None:
    run = begun(tmp_path / "exp")
    with run.claimed():
        latest = unfinished(tmp_path, "exp", "d")
        assert latest is not None
        with pytest.raises(RunError, match="another process is working on this run"), latest.claimed():
            pass
    with pytest.raises(OSError, match="full"), run.claimed():
        raise OSError("full")
    (tmp_path / "exp" / "run.lock").touch()  # left by a kill
    with latest.claimed():
        assert latest.path == tmp_path / "exp"


def test_the_latest_unfinished_run_of_the_same_settings_is_found(tmp_path: Path) -> None:
    for age, name in enumerate(("exp", "exp-3", "exp-2")):
        run = begun(tmp_path / name)
        os.utime(run.config, (1000 + age, 1000 + age))
    begun(tmp_path / "exp-4", digest="other settings")
    begun(tmp_path / "exp-5").finish({})
    begun(tmp_path / "exp1")
    begun(tmp_path / "exp-old")
    (tmp_path / "exp-6").mkdir()
    latest = unfinished(tmp_path, "exp", "d")
    assert latest is not None
    assert latest.path.name == "exp-2"


def test_no_unfinished_run(tmp_path: Path) -> None:
    assert unfinished(tmp_path / "nowhere", "exp", "d") is None
    begun(tmp_path / "exp").finish({})
    assert unfinished(tmp_path, "exp", "d") is None


@pytest.mark.parametrize("name", ["a[b]", "a*", "a?", "a+b"])
def test_special_characters_in_a_name_are_literal(tmp_path: Path, name: str) -> None:
    begun(tmp_path / name)
    begun(tmp_path / "ab")
    latest = unfinished(tmp_path, name, "d")
    assert latest is not None
    assert latest.path.name == name
