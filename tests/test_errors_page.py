"""The page of error messages holds every message of the code, and what makes it."""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fedmllm.errors
from errors_page import PACKAGE, ROOT, Message, neutral, render, subject_of

PAGE = ROOT / "docs" / "errors.md"
FAMILY = {"UserError", "ConfigError", "DataError", "RunError", "EntryError", "RecordError", "ProtocolError", "Refusal", "TooFewUpdates", "TooFew", "Absent"}


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
