"""What the commands write to stdout: one JSON object, or tables."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmllm.errors import printable
from fedmllm.storage.strict_json import strict

if TYPE_CHECKING:
    from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class OutputLost(Exception):  # noqa: N818 (named after the event)
    """Standard output cannot be written. `done` is what the command has done all the same, if anything; `closed` if its reader
    wants no more, as `head` does, which is no failure."""

    def __init__(self, reason: str, closed: bool) -> None:
        super().__init__(reason)
        self.closed, self.done = closed, ""


def fill_closed_streams() -> None:
    """Open the null device in place of closed standard streams. The next file would otherwise take their number, and what a
    library prints would be written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115 (open until the process ends)


def show(line: str) -> None:
    """Write a line to standard output, with everything in it escaped that could steer a terminal. Raises OutputLost."""
    _write(printable(line))


def _write(text: str) -> None:
    if sys.stdout is None:  # it was closed when the process began
        raise OutputLost("it is closed", closed=True)
    try:
        typer.echo(text)
    except OSError as error:
        # The interpreter flushes standard output when it exits, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputLost(error.strerror or str(error), closed=error.errno == errno.EPIPE) from None


@contextmanager
def standing(done: str) -> Iterator[None]:
    """While the block writes to standard output, `done` says what is complete even if that fails."""
    try:
        yield
    except OutputLost as error:
        error.done = done
        raise


def say(message: str) -> None:
    """Write a line to standard error."""
    typer.echo(printable(message), err=True)


def print_json(value: Any) -> None:
    """NaN and infinities are written as null."""
    _write(json.dumps(strict(value), indent=2, allow_nan=False))  # JSON escapes control characters itself


def print_table(table: Table) -> None:
    """Print a table of rich, in parts if it is wide. Its strings are data: nothing in them is markup, and they are escaped as
    by `show`."""
    from rich.console import Console
    from rich.text import Text

    from fedmllm.cli.tables import parts_that_fit

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:  # every string of a table passes here
            return super().render_str(printable(text), **options)

    # Rich takes 80 columns if stdout is not a terminal; a file can hold more.
    width = None if "COLUMNS" in os.environ or (sys.stdout and sys.stdout.isatty()) else 140
    console = PlainConsole(width=width, markup=False, emoji=False)
    with console.capture() as printed:
        for part in (table.title, *parts_that_fit(table, console), table.caption):
            if part:
                console.print(part, style="italic" if isinstance(part, str) else None, highlight=False)
    _write(printed.get().removesuffix("\n"))


def print_suites(findings: Mapping[str, Any]) -> None:
    """What suites found about a model."""
    from fedmllm.report.suites import suite_tables

    for name, found in findings.items():
        for table in suite_tables(name, found):
            print_table(table)
        for sentence in found["unavailable"]:
            show(f"{name}: {sentence}")


def print_result(result: dict[str, Any], path: Path, as_json: bool) -> None:
    """The result of one run."""
    from fedmllm.report.tables import comparison, metrics_table

    with standing(f"the run is complete, and its result is in {path / 'result.json'}"):
        if as_json:
            print_json(result)
            return
        print_table(comparison([result], [path]))
        print_table(metrics_table(result["metrics"], "by modality pattern"))
        print_suites(result.get("suites") or {})
        show(f"run directory: {path}")
