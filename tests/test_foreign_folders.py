"""Folders and archives from elsewhere: no bomb, no path out, no code, and one sentence for files of another shape."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import call
from fedmllm.config import validate
from fedmllm.errors import RunError
from fedmllm.experiment.parts import with_defaults
from fedmllm.models.adapter import read_adapter
from fedmllm.runs.reevaluate import reevaluate
from fedmllm.storage import archive
from fedmllm.storage.archive import opened
from fedmllm.storage.lock import FileLock
from fedmllm.storage.run_dir import RunDir
from made_files import RESULT
from made_runs import index_of, make_run, make_sweep, write_archive


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary folders; other processes use a different one."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def bomb(file: Path, members: int, size: int) -> Path:
    """An archive of a sweep whose folder also has this many files of zeros."""
    return write_archive(file, {"made/sweep.json": index_of(), **{f"made/x/{i}": bytes(size) for i in range(members)}})


@pytest.mark.parametrize(("members", "size"), [(3, 2**20), (1, 2**21 + 1), (300, 0)])
def test_a_bomb_is_refused_before_it_is_unpacked(
    members: int, size: int, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmllm.storage.archive.MAX_BYTES", 2**21)
    monkeypatch.setattr("fedmllm.storage.archive.MAX_MEMBERS", 200)
    sizes: list[int] = []
    clean = tempfile.TemporaryDirectory.cleanup

    def measure(folder: tempfile.TemporaryDirectory[str]) -> None:
        sizes.append(sum(path.stat().st_size for path in Path(folder.name).rglob("*") if path.is_file()))
        clean(folder)

    monkeypatch.setattr(tempfile.TemporaryDirectory, "__exit__", lambda folder, *_: measure(folder))
    file = bomb(tmp_path / "m.tar.xz", members, size)
    assert file.stat().st_size < 20_000
    done = call("compare", file)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {file} unpacks to more than 200 members or 2,097,152 bytes")
    assert done.stderr.count("\n") == 1
    assert sizes[0] <= 2**21, "it stops while it unpacks"
    assert list(scratch.iterdir()) == []


def test_the_limits_leave_room_for_the_largest_grids(tmp_path: Path) -> None:
    assert (archive.MAX_MEMBERS, archive.MAX_BYTES) == (100_000, 2**30)
    with opened([bomb(tmp_path / "m.tar.xz", 300, 100)]) as [folder]:
        assert len(list((folder / "x").iterdir())) == 300


ROW = {"axes": {"m": "a"}, "seed": 0, "kind": "local", "id": "x"}
GOOD = {"schema": 1, "name": "made", "axes": ["m"], "cells": [ROW]}
BAD_INDEXES: dict[str, tuple[object, str]] = {
    "a list": ([], "dictionary"),
    "a number": (5, "dictionary"),
    "null": (None, "dictionary"),
    "a string": ("made", "dictionary"),
    "no name": ({k: v for k, v in GOOD.items() if k != "name"}, "name: Field required"),
    "no cells": ({k: v for k, v in GOOD.items() if k != "cells"}, "cells: Field required"),
    "a name that is none": (GOOD | {"name": 5}, "name: Input should be a valid string"),
    "a name that leads out": (GOOD | {"name": "../../x"}, "'../../x' cannot be the name of a folder"),
    "an absolute name": (GOOD | {"name": "/etc/x"}, "'/etc/x' cannot be the name of a folder"),
    "a name on Windows": (GOOD | {"name": "..\\x"}, "cannot be the name of a folder"),
    "a hidden name": (GOOD | {"name": ".ssh"}, "cannot be the name of a folder"),
    "an empty name": (GOOD | {"name": ""}, "cannot be the name of a folder"),
    "a name of control characters": (GOOD | {"name": "a\x1b[2J"}, "cannot be the name of a folder"),
    "a long name": (GOOD | {"name": "a" * 5000}, "cannot be the name of a folder"),
    "an id that leads out": (GOOD | {"cells": [ROW | {"id": "../x"}]}, "'../x' cannot be the name of a folder"),
    "the folder itself as id": (GOOD | {"cells": [ROW | {"id": "."}]}, "'.' cannot be the name of a folder"),
    "an id that is none": (GOOD | {"cells": [ROW | {"id": ["x"]}]}, "cells.0.id: Input should be a valid string"),
    "axes that are none": (GOOD | {"axes": "m"}, "axes: Input should be a valid list"),
    "a cell that is none": (GOOD | {"cells": ["x"]}, "cells.0: Input should be"),
    "a cell of other axes": (GOOD | {"cells": [ROW | {"axes": {"n": "a"}}]}, "other axes than the sweep"),
    "a value that is no text": (GOOD | {"cells": [ROW | {"axes": {"m": 5}}]}, "cells.0.axes.m: Input should be a valid string"),
    "an unknown kind": (GOOD | {"cells": [ROW | {"kind": "best"}]}, "cells.0.kind"),
    "a seed that is none": (GOOD | {"cells": [ROW | {"seed": "0"}]}, "cells.0.seed"),
    "a margin below zero": (GOOD | {"margin": -1.0}, "margin"),
    "deeply nested": ("[" * 100_000, "recursion"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_an_index_of_another_shape_is_one_sentence(case: str, tmp_path: Path) -> None:
    content, sentence = BAD_INDEXES[case]
    folder = tmp_path / "grid"
    folder.mkdir()
    (folder / "sweep.json").write_text(str(content) if case == "deeply nested" else json.dumps(content))
    make_run(folder / "x", {"both": 0.5}, kind="local")
    packed = write_archive(tmp_path / "m.tar.xz", {"made/sweep.json": (folder / "sweep.json").read_bytes()})
    for command in [
        ("compare", folder), ("compare", packed), ("report", folder, "--out", tmp_path / "out" / "page.md"),
        ("report", packed, "--out", tmp_path / "out" / "page.md"), ("pack", folder, "--to", tmp_path / "out" / "x.tar.xz"),
    ]:  # fmt: skip
        done = call(*command)
        assert done.exit_code == 2
        assert done.stderr.startswith(f"error: {packed if packed in command else folder}/sweep.json cannot be read")
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1
        assert len(done.stderr) < 600
    assert not (tmp_path / "out").exists()


BAD_RUNS: dict[str, tuple[str, str]] = {
    "a list": ("result.json", "[]"),
    "no metrics": ("result.json", '{"schema": 1}'),
    "metrics of another type": ("result.json", '{"primary_metric": "accuracy", "metrics": 5}'),
    "a metric that is no name": ("result.json", '{"primary_metric": {}, "metrics": {}}'),
    "seconds that are none": ("result.json", json.dumps(RESULT | {"seconds": {}})),
    "modalities that are none": ("result.json", json.dumps(RESULT | {"modalities": {"drawn": []}})),
    "settings of nothing": ("config.toml", ""),
    "settings that are no TOML": ("config.toml", "[[["),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_run_of_another_shape_is_one_sentence(case: str, tmp_path: Path) -> None:
    name, content = BAD_RUNS[case]
    cell = {"setting": ["A"], "method": ["FedAvg"]}
    folder = make_sweep(tmp_path / "grid", cell, lambda cell, seed, pattern: 0.5, seeds=[0])
    (folder / "federated-0" / name).write_text(content)
    for command in [("compare", folder), ("report", folder, "--out", tmp_path / "page.md")]:
        done = call(*command)
        assert done.exit_code == 2
        assert done.stderr.startswith(f"error: {folder}/federated-0")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("count", [0, 4, 201])
def test_another_number_of_resampled_scores_is_one_sentence(count: int, tmp_path: Path) -> None:
    axes = {"setting": ["A"], "method": ["FedAvg", "FedProx"]}
    folder = make_sweep(tmp_path / "grid", axes, lambda cell, seed, pattern: 0.5, seeds=[0, 1])
    (folder / "federated-2" / "result.json").write_text(json.dumps(RESULT | {"bootstrap_scores": {"both": [0.5] * count}}))
    for command in [("compare", folder, "--baseline", "FedAvg"), ("report", folder, "--out", tmp_path / "page.md")]:
        done = call(*command)
        assert done.exit_code == 2
        assert f"federated-2: result.json has {count} resampled scores under the pattern 'both' instead of 200" in done.stderr


def test_pack_takes_no_file_from_outside_the_folder(tmp_path: Path) -> None:
    axes = {"setting": ["A"], "method": ["FedAvg"]}
    folder = make_sweep(tmp_path / "grid", axes, lambda cell, seed, pattern: 0.5, seeds=[0])
    (tmp_path / "secret").write_text("mine")
    kept = folder / "federated-0" / "config.toml"
    inside = kept.rename(kept.with_name("settings.toml"))
    kept.symlink_to("settings.toml")
    assert call("pack", folder, "--to", tmp_path / "x.tar.xz").exit_code == 0
    kept.unlink()
    kept.symlink_to(tmp_path / "secret")
    done = call("pack", folder, "--to", tmp_path / "y.tar.xz")
    assert done.exit_code == 2
    assert done.stderr == f"error: {kept} is a link that leads out of {folder}; put the file itself there.\n"
    assert not (tmp_path / "y.tar.xz").exists()
    assert inside.is_file()


# Testing somebody's run again

PATHS = {
    "absolute": "/srv/models/evil",
    "relative": "./evil",
    "above": "../evil",
    "above inside": "a/../../evil",
    "home": "~/evil",
    "deep": "a/b/c",
    "Windows": "C:\\evil",
    "share": "\\\\host\\evil",
    "address": "https://x.example/evil",
    "a folder here that looks like an id": "evil/model",
    "a folder here of one name": "model",
    "hidden": ".evil",
    "empty": "",
}


def foreign_run(folder: Path, **model: Any) -> Path:
    task = {"name": "jsonl", "train": "train.jsonl", "test": "test.jsonl"}
    config = {"task": task, "partition": {"name": "iid", "clients": 10}}
    make_run(folder, {"both": 0.5}, config=config | ({"model": model} if model else {}))
    return folder


@pytest.mark.parametrize("case", PATHS)
def test_eval_takes_no_model_from_a_path_of_the_folder(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil" / "model").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    done = call("eval", foreign_run(tmp_path / "run", name=PATHS[case]))
    assert done.exit_code == 2
    assert done.stderr == (
        f"error: {tmp_path}/run/config.toml asks for model.name = {PATHS[case]!r}, which is a path and not a model on the "
        "Hugging Face hub; if you trust the folder, allow it with --trust-config.\n"
    )


def test_eval_runs_no_code_of_the_folder(tmp_path: Path) -> None:
    done = call("eval", foreign_run(tmp_path / "a", name="owner/model", trust_remote_code=True))
    assert done.exit_code == 2
    assert "config.toml asks for model.trust_remote_code = true, which runs code that comes with the model; if" in done.stderr
    done = call("eval", foreign_run(tmp_path / "b", name="/x", trust_remote_code=True))
    assert "which is a path and not a model on the Hugging Face hub, and for model.trust_remote_code = true" in done.stderr
    assert done.stderr.count("\n") == 1
    both = RunDir(tmp_path / "b")
    experiment = with_defaults(validate({"task": {"name": "shapes-qa"}, "model": {"name": "/x"}}))
    with pytest.raises(RunError, match="--trust-config"):
        reevaluate(both, experiment)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({}, ()),
        ({"name": "pocket"}, ()),
        ({"name": "owner/some-model_1.5B"}, ()),
        ({"name": "gpt2"}, ()),
        ({"name": "/x"}, ("--trust-config",)),
        ({"name": "owner/model", "trust_remote_code": True}, ("--trust-config",)),
    ],
)
def test_eval_goes_on_to_the_data_otherwise(model: dict[str, Any], options: tuple[str, ...], tmp_path: Path) -> None:
    done = call("eval", foreign_run(tmp_path / "run", **model), *options)
    assert done.exit_code == 2
    assert "train.jsonl" in done.stderr, "the data of the run are not here"


def test_an_adapter_is_never_a_pickle(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        torch.save(Evil(), tmp_path / name)
        with pytest.raises(RunError, match=re.escape(f"{tmp_path} contains no readable adapter_model.safetensors")):
            read_adapter(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_lock_leaves_the_target_of_a_link_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run.lock").symlink_to("mine")
    lock = FileLock(tmp_path / "run.lock")
    assert lock.acquire()
    lock.release()
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "run.lock").is_symlink()
