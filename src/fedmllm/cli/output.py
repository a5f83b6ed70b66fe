"""What the commands write to stdout: one JSON object, or tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmllm.storage.strict_json import strict

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def print_json(value: Any) -> None:
    """NaN and infinities are written as null."""
    typer.echo(json.dumps(strict(value), indent=2, allow_nan=False))


def print_table(table: Any) -> None:
    from rich.console import Console

    # Rich cuts tables to 80 columns if stdout is not a terminal; a file can hold more.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def print_result(result: dict[str, Any], path: Path, as_json: bool) -> None:
    """The result of one run."""
    from fedmllm.report.tables import comparison, metrics_table

    if as_json:
        print_json(result)
        return
    print_table(comparison([result]))
    print_table(metrics_table(result["metrics"], "by modality pattern"))
    typer.echo(f"run directory: {path}")
