"""Errors that a user can fix. The command line prints their message, without a traceback, and exits with status 2."""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable
from html import escape
from pathlib import Path


class UserError(Exception):
    """Its message is one sentence: what is wrong, where, and what to do about it. What it quotes may come from a damaged or
    hostile file, so it is one printable line, and cut in the middle if it is long."""

    def __init__(self, message: str) -> None:
        line = printable(message)
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 350]} … {line[-300:]}")


class ConfigError(UserError):
    """The experiment file or a `--set` names something that does not exist or is not possible."""


class DataError(UserError):
    """A data set is missing or contains samples that cannot be used."""


class RunError(UserError):
    """A run directory, a sweep or an archive cannot be used as requested."""


def failure(error: BaseException) -> str:
    """One line about the error that ended a run: the sentence of a `UserError`; of another its type, message and place."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    where = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(str(error).split()) or type(error).__name__
    return printable(f"failed: {type(error).__name__}: {reason} ({Path(where.filename).name}, line {where.lineno})")


def printable(message: str) -> str:
    """The message with line feeds, other control characters and marks of text direction escaped: one line, and nothing in it,
    such as a file name from elsewhere, can steer a terminal."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], message)


def brief(message: str, limit: int = 500) -> str:
    """Text from another machine as a message may quote it: printable, and cut after `limit` characters."""
    return printable(message if len(message) <= limit else f"{message[:limit]}…")


_LONGEST = 1200
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def xml_text(text: str) -> str:
    """The text as it is written in HTML and SVG, in an element or a quoted attribute: nothing in it is a tag, and it holds no
    character that XML forbids."""
    return escape(printable(text))


def suggest(wrong: str, known: Iterable[str]) -> str:
    """A clause for the end of a message: the closest known name, or all of them if none is close."""
    names = sorted(known)
    closest = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if closest:
        return f"did you mean {closest[0]!r}?"
    return f"choose one of {', '.join(names)}." if names else "none exist."
