"""The page of error messages holds every message of the code, and what makes it."""

from __future__ import annotations

import ast
import html
import re
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from commands import call
from errors_page import PACKAGE, ROOT, ErrorsPage, Message, neutral, render, subject_of
from fedmllm.algorithms import algorithms, screening
from fedmllm.cli import common
from fedmllm.data.samples import Problem
from fedmllm.errors import ConfigError
from fedmllm.federation import step
from fedmllm.remote.protocol import Job
from fedmllm.remote.worker import Worker
from fedmllm.secure.client import Refusal
from helpers import round_info, tensors, update

PAGE = ROOT / "docs" / "errors.md"
FAMILY = (
    "UserError ConfigError DataError RunError EntryError RecordError ProtocolError Refusal TooFew TooFewUpdates Absent"
).split()
"""The errors whose text a user reads."""


def pattern_of(node: ast.expr) -> str:
    """A regular expression for the text of an expression: what is filled in may be anything."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(pattern_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return pattern_of(node.left) + pattern_of(node.right)
    return ".*"


@cache
def messages_of_the_code() -> list[tuple[str, str, str]]:
    """(module, place, pattern) of each message with words of its own."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FAMILY and node.args:
                pattern = pattern_of(node.args[0])
                if re.search(r"\w", re.sub(r"\\.|\.\*", "", pattern)):
                    found.append((module, f"{file.relative_to(ROOT)}:{node.lineno}", pattern))
    return found


@cache
def shown() -> str:
    """All messages of the page, one a line."""
    rows = (line.strip("| \n").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| "))
    return "\n".join(html.unescape("; ".join(filter(None, row[:2]))) for row in rows)


def test_every_message_of_the_code_is_on_the_page() -> None:
    """A new or changed message needs a test that replays it, and then `make errors`."""
    missing = [
        (place, re.sub(r"\\(.)", r"\1", pattern.replace(".*", "…")))
        for _, place, pattern in messages_of_the_code()
        if not re.search(re.sub(r"^(\.\*)+|(\.\*)+$", "", pattern), shown())
    ]
    assert missing == [], "no test replays these messages, or the page is of an earlier version: run `make errors`"


def test_every_module_with_messages_has_a_subject() -> None:
    """SUBJECTS in errors_page.py names them."""
    assert {module for module, _, _ in messages_of_the_code() if subject_of(module) == "Others"} == set()
    assert subject_of("storage.archive:pack:1") == "Archives"
    assert subject_of("storage.archives:f:1") == "Run folders and checkpoints"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{tmp}/grid/x.toml: not valid", "x.toml: not valid"),
        ("{tmp} is not a run directory", "folder is not a run directory"),
        ("RuntimeError at the site (test_flower.py, line 261)", "RuntimeError at the site (test_flower.py, line …)"),
        ("cannot listen on 127.0.0.1:54521 (in use)", "cannot listen on 127.0.0.1:… (in use)"),
        ("the name " + 50 * "x" + " is long", "the name xxx… is long"),
        ("Expecting value: line 1 column 9 (char 8)", "Expecting value: line … column …"),
        (" ".join(["words"] * 200), " ".join(["words"] * 200)[:600] + "…"),
        ("10 of 400 samples", "10 of 400 samples"),
    ],
)
def test_what_differs_from_run_to_run_is_left_out(text: str, expected: str) -> None:
    folder = f"{tempfile.gettempdir()}/pytest-of-me/pytest-3/popen-gw1/test_x0"
    assert neutral(text.format(tmp=folder)) == expected.replace("x.toml", "grid/x.toml")


def test_messages_of_one_place_are_one_row_with_all_that_makes_them() -> None:
    messages = [
        Message("Archives", "storage.archive:pack:1", "b.tar.xz cannot be read (too short); get it again.", "bad file: empty"),
        Message("Archives", "storage.archive:pack:1", "a.tar.xz cannot be read (no archive); get it again.", "bad file: cut"),
        Message("Archives", "storage.archive:pack:2", "a.tar.xz: 'x|y' leads out <b>.", "a link"),
    ]
    assert render(reversed(messages)) == render(messages)
    assert render(messages).partition("## Archives\n")[2].splitlines() == [
        "| message | what to do | bad input |",
        "|---|---|---|",
        "| a.tar.xz: 'x&#124;y' leads out &lt;b&gt;. |  | a link |",
        "| b.tar.xz cannot be read (too short) | get it again. | bad file: cut, empty |",
    ]


def test_the_reason_why_a_sample_is_bad_is_a_part_of_its_message() -> None:
    messages = [
        Message("Tasks and samples", "sample", "'k' is empty", "an entry without k"),
        Message("Tasks and samples", "data.loading:f:1", "x.jsonl, line 2: 'k' is empty; fix it.", "a bad line"),
    ]
    assert "| x.jsonl, line 2: 'k' is empty | fix it. | a bad line; an entry without k |\n" in render(messages)
    assert render(messages).count("is empty") == 1


def test_many_cases_are_counted() -> None:
    messages = [Message("Archives", "storage.archive:f:1", "bad.", f"a file: {'abcdefghijkl'[i]}") for i in range(12)]
    assert "| a file: a, b, c, d, e, f, g, h, 4 more |\n" in render(messages)


def test_messages_are_recorded_here_and_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in [
        (pytest, "raises"), (common, "say"), (Problem, "__init__"), (Refusal, "__init__"), (Worker, "answer"),
        (screening, "screen"), (step, "screen"),
    ]:  # fmt: skip
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that it is restored
    recorded = ErrorsPage(tmp_path / "errors.md")
    recorded.pytest_runtest_setup(SimpleNamespace(obj=None, originalname="test_a_bad_input"))
    with pytest.raises(ConfigError, match="there is no algorithm"):
        algorithms.build("fedavgg", {})
    with pytest.raises(ZeroDivisionError):  # not the project's
        _ = 1 / 0
    assert call("pack", "nowhere", "--to", tmp_path / "x.tar.xz").exit_code == 2
    Problem("x.jsonl, line 2", "'k' is empty")
    updates = [update(0, tensors(w=[float("nan")]))]
    step.screen(updates, algorithms.build("fedavg", {}), {"adapter": tensors(w=[0.0])}, round_info(sampled=(0,)))
    Worker(tmp_path).answer([Job("describe", "../elsewhere", "")])
    recorded.pytest_runtest_setup(SimpleNamespace(obj=SimpleNamespace(is_hypothesis_test=True)))
    Problem("x.jsonl, line 3", "drawn at random")
    other = Message("Archives", "storage.archive:f:1", "cut off.", "an archive")
    recorded.pytest_testnodedown(SimpleNamespace(workeroutput={"messages": [list(other)]}))
    recorded.pytest_sessionfinish(SimpleNamespace(config=SimpleNamespace()))
    rows = [line for line in (tmp_path / "errors.md").read_text().splitlines() if line.startswith("| ")]
    assert [row for row in rows if not row.startswith("| message ")] == [
        "| algorithm.name: there is no algorithm 'fedavgg' | did you mean 'fedavg'? | a bad input |",
        "| 'k' is empty |  | a bad input |",
        "| NaN or infinity in 'w' |  | a bad input |",
        "| the run's name is not one that fedmllm creates. |  | a bad input |",
        "| cut off. |  | an archive |",
        "| nowhere is not a sweep's folder | give the output folder of &#96;fedmllm sweep&#96;. | a bad input |",
    ]
    assert "drawn" not in (tmp_path / "errors.md").read_text()
