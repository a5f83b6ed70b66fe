"""Errors that a user can mend. The command line prints their message and leaves with status 2, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One sentence: what is wrong, where, and what to do about it."""


class ConfigError(UserError):
    """The experiment file, or a `--set`, asks for something that does not exist or cannot be."""


class DataError(UserError):
    """A data set is missing, or holds samples that cannot be used."""


class RunError(UserError):
    """A run directory cannot be used as asked."""


def suggest(wrong: str, known: Iterable[str]) -> str:
    """A clause to end a message with: the nearest known name, else all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known are {', '.join(names)}." if names else "none are known."
