"""The code, tests and commands of docs/extending.md work as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from fedmllm.testing.new import TEMPLATES, NewKind, files_of
from plugin_process import commands, python

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
NAMED = {match[1]: text for _, text in BLOCKS if (match := re.match(r"# (\w+\.(?:py|toml))\n", text))}
LINES = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
SMALL = {
    "quickstart": (
        "task.train_samples=60", "task.test_samples=12", "task.companion.train_samples=40", "task.companion.test_samples=8",
    ),
    "mine.toml": ("task.train=120", "task.test=12"),
}  # fmt: skip
"""Settings that make the page's commands short."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page."""
    folder = tmp_path_factory.mktemp("extending")
    for name, text in NAMED.items():
        (folder / name).write_text(text)
    return folder


def test_the_page_has_three_parts_with_a_test_each() -> None:
    parts = {"trimmed_mean.py", "uneven_rates.py", "color_squares.py"}
    assert NAMED.keys() == parts | {f"test_{name}" for name in parts} | {"mine.toml"}
    for name in parts:
        assert len([line for line in NAMED[f"test_{name}"].splitlines()[1:] if line]) == 4, "two imports and two lines"


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_templates_are_the_files_of_the_page(kind: NewKind) -> None:
    files = files_of(kind, TEMPLATES[kind].name)
    assert {name: f"# {name}\n{text}" for name, text in files.items()}.items() <= NAMED.items()


def test_the_tests_of_the_page_pass(folder: Path) -> None:
    code = "import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    output = python(code, *sorted(name for name in NAMED if name.startswith("test_")), folder=folder)
    assert "3 passed" in output


def test_the_commands_of_the_page_run(folder: Path) -> None:
    lines = []
    for line in (shlex.split(line) for line in LINES if line.startswith("fedmllm ")):
        command, file = line[1:3]
        settings = [*SMALL[file], *(["train.rounds=1", "eval.bootstrap=20"] if command == "run" else [])]
        lines.append([*line[1:], *(word for setting in settings for word in ("--set", setting)), "--json"])
    assert [line[:2] for line in lines] == [["run", "quickstart"], ["run", "mine.toml"], ["check", "mine.toml"]]
    results = commands(lines, folder)
    assert [status for status, _, _ in results] == [0, 0, 0], results
    averaged, squares, checked = (json.loads(out) for _, out, _ in results)
    assert averaged["algorithm"] == "trimmed-mean"
    assert squares["task"] == "color-squares"
    assert averaged["refused_updates"] == squares["refused_updates"] == 0
    gaps = [row["gap"] for row in checked["clients"]]
    assert gaps[0] == gaps[3] == 0, "their rate is 0"
    assert min(gaps[2], gaps[5]) > max(gaps[1], gaps[4]) > 0, "rates of 0.9 and 0.3"


def test_every_check_on_the_page_exists() -> None:
    import fedmllm.testing

    named = set(re.findall(r"\bcheck_\w+", PAGE))
    assert named == {name for name in fedmllm.testing.__all__ if name.startswith("check_")}
