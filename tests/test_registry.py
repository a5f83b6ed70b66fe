from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from fedmllm import registry
from fedmllm.algorithms import algorithms, regularizations
from fedmllm.data.partitions import partitions
from fedmllm.data.prompts import prompts
from fedmllm.data.scenarios import scenarios
from fedmllm.data.tasks import tasks
from fedmllm.errors import ConfigError, suggest
from fedmllm.registry import Registry

REGISTRIES: list[Registry[Any]] = [tasks, partitions, scenarios, prompts, algorithms, regularizations]
PARTS = [pytest.param(r, name, id=f"{r.kind}-{name}") for r in REGISTRIES for name in r.names()]

SQUARE = '''
from toybox import toys

@toys.register("square")
def square(*, size: float, color: str = "red", corners: int = 4):
    """A square thing.

    More about it.
    """
    if corners != 4:
        raise ValueError(f"corners = {corners} must be 4")
    return ("square", size, color)
'''


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry[Any]]:
    """A registry of a package with two files and one part in each."""
    package = tmp_path / "toybox"
    package.mkdir()
    (package / "__init__.py").write_text("from fedmllm.registry import Registry\ntoys = Registry('toy', __name__)\n")
    (package / "square.py").write_text(SQUARE)
    (package / "ball.py").write_text("from toybox import toys\n\n@toys.register('ball')\ndef ball():\n    return 'ball'\n")
    monkeypatch.syspath_prepend(tmp_path)
    import toybox  # type: ignore[import-not-found]

    yield toybox.toys
    for name in [name for name in sys.modules if name.partition(".")[0] == "toybox"]:
        del sys.modules[name]


def test_parts_are_found_by_walking_the_package(toys: Registry[Any]) -> None:
    assert toys.names() == ["ball", "square"]
    assert toys.describe("square") == "A square thing."
    assert toys.option_names("square") == ["color", "corners", "size"]
    assert toys.build("square", {"size": 2.5}) == ("square", 2.5, "red")


def test_parts_are_found_through_entry_points(toys: Registry[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "plugin"

        def load(self) -> None:
            toys.register("kite")(lambda: "kite")

    class Points:
        def select(self, group: str) -> list[Point]:
            return [Point()] if group == "fedmllm.toys" else []

    monkeypatch.setattr(registry, "installed_parts", Points)
    assert toys.names() == ["ball", "kite", "square"]
    assert toys.build("kite", {}) == "kite"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sqare", {}, "toy.name: there is no toy 'sqare'; did you mean 'square'?"),
        ("zzz", {}, "toy.name: there is no toy 'zzz'; choose one of ball, square."),
        ("square", {"size": 1.0, "colour": "red"}, "toy.colour: unknown key for toy 'square'; did you mean 'color'?"),
        ("ball", {"size": 1.0}, "toy.size: unknown key for toy 'ball'; none exist."),
        ("square", {}, "toy.size: this key is required by toy 'square'."),
        ("square", {"size": "big"}, "toy.size: input should be a valid number, got 'big'."),
        ("square", {"size": float("nan")}, "toy.size: input should be a finite number, got nan."),
        ("square", {"size": float("inf")}, "toy.size: input should be a finite number, got inf."),
        ("square", {"size": 1.0, "corners": True}, "toy.corners: input should be a valid integer, got True."),
        ("square", {"size": 1.0, "corners": 4.0}, "toy.corners: input should be a valid integer, got 4.0."),
        ("square", {"size": "a", "color": 1}, "toy.size: input should be a valid number, got 'a'. (and 1 more)"),
        ("square", {"size": 1.0, "corners": 5}, "toy: corners = 5 must be 4"),
    ],
)
def test_bad_names_and_options_are_one_sentence(toys: Registry[Any], name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        toys.build(name, options)
    assert str(caught.value) == message


@pytest.mark.parametrize(("name", "options"), [("sqare", {}), ("square", {"sise": 1.0}), ("square", {"size": 1, "corners": 5})])
def test_messages_name_the_table_of_the_part(toys: Registry[Any], name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^chest\.toy"):
        toys.build(name, options, where="chest.toy")


def test_an_integer_is_accepted_for_a_float(toys: Registry[Any]) -> None:
    _, size, _ = toys.build("square", {"size": 2})
    assert isinstance(size, float)


def test_a_name_is_registered_once(toys: Registry[Any]) -> None:
    toys.names()
    with pytest.raises(ConfigError, match=r"toy 'ball' is registered twice, by toybox\.ball and test_registry; rename one"):
        toys.register("ball")(lambda: None)


@pytest.mark.parametrize(("part", "name"), PARTS)
def test_every_part_of_the_package_keeps_the_contract(part: Registry[Any], name: str) -> None:
    factory = part.factory(name)
    hints = get_type_hints(factory)
    for option in inspect.signature(factory).parameters.values():
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.name in hints
    assert part.describe(name).endswith(".")
    assert part.option_names(name) == sorted(set(hints) - {"return"})


def test_suggest_names_the_closest_or_all() -> None:
    assert suggest("hybird", ["hybrid", "cross"]) == "did you mean 'hybrid'?"
    assert suggest("zzz", ["b", "a"]) == "choose one of a, b."
    assert suggest("zzz", []) == "none exist."
