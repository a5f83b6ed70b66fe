"""`fedmllm new`: a part of one's own, which works as it is written."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import call
from fedmllm.api import read_experiment
from fedmllm.config import parse_override
from fedmllm.experiment.parts import REGISTRIES, build
from fedmllm.registry import PLUGINS, load_plugin
from fedmllm.testing.new import TEMPLATES, NewKind


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, and without the new parts in the registries afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(PLUGINS, "")
    monkeypatch.syspath_prepend(str(tmp_path))
    modules, before = set(sys.modules), {kind: set(REGISTRIES[kind].names()) for kind in TEMPLATES}
    yield
    for kind, names in before.items():
        forget(kind, names)
    for module in set(sys.modules) - modules:
        if module.startswith("fedmllm_plugin_") or "my_" in module:
            del sys.modules[module]


def forget(kind: NewKind, keep: set[str]) -> None:
    registry = REGISTRIES[kind]
    for name in set(registry.names()) - keep:
        del registry._factories[name]
        registry._options.pop(name, None)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_new_part_passes_its_test_and_is_found(kind: NewKind, tmp_path: Path) -> None:
    done = call("new", kind, f"my-{kind}")
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {f"my_{kind}.py", f"test_my_{kind}.py"}
    assert f"pytest test_my_{kind}.py" in done.stdout
    before = set(REGISTRIES[kind].names())
    getattr(importlib.import_module(f"test_my_{kind}"), f"test_my_{kind}")()
    forget(kind, before)
    listed = call("list", f"{kind}s", "--plugin", f"my_{kind}.py", "--json")
    assert f"my-{kind}" in [part["name"] for part in json.loads(listed.stdout)]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_printed_command_is_valid(kind: NewKind) -> None:
    words = shlex.split(call("new", kind, f"my-{kind}").stdout.splitlines()[-1])
    assert words[:6] == ["fedmllm", "run", "quickstart", "--plugin", f"my_{kind}.py", "--set"]
    load_plugin(Path(words[4]))
    settings = [parse_override(word) for word in words[6:] if word != "--set"]
    config = build(read_experiment("quickstart", settings)[0]).config
    assert getattr(config, kind).name == f"my-{kind}"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("algorithm", "2-fast", "'2-fast' cannot name a part; use small letters, digits and hyphens, as in my-algorithm."),
        ("task", "class", "'class' cannot name a part"),
        ("task", "../x", "'../x' cannot name a part"),
        ("scenario", "Größe", "cannot name a part"),
        ("algorithm", "fedavg", "algorithm.name: 'fedavg' exists already; choose another name."),
        ("scenario", "label_dependent", "scenario.name: 'label-dependent' exists already; choose another name."),
        ("scenario", "json", "'json' is the name of an installed Python module, which the file would hide"),
    ],
)
def test_a_name_that_cannot_be_used_is_one_sentence(kind: str, name: str, message: str, tmp_path: Path) -> None:
    done = call("new", kind, name)
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["my_task.py", "test_my_task.py"])
def test_a_new_part_overwrites_nothing(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("mine")
    done = call("new", "task", "my-task")
    assert (done.exit_code, done.stderr) == (2, f"error: {file} exists already; choose another name.\n")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
