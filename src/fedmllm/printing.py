"""What the command line writes to stdout: one JSON object, or a table."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from fedmllm.store import strict

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def print_json(value: Any) -> None:
    """NaN and infinities are written as null."""
    typer.echo(json.dumps(strict(value), indent=2, allow_nan=False))


def print_table(table: Any) -> None:
    from rich.console import Console

    # Rich cuts tables to 80 columns where it cannot ask the terminal; a file can hold more.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
