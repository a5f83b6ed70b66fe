"""The commands for the first steps: `init`, `new` and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedmllm.cli.common import Verbose, showing
from fedmllm.cli.output import Json, print_json, print_table, show


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    task: Annotated[Literal["classification", "qa"], typer.Option("--task", help="What is learned.")] = "classification",
) -> None:
    """Write a folder to start from: an experiment with comments, samples with pictures, and a README of next steps."""
    from fedmllm.data.starter import write_starter

    write_starter(folder, task)
    show(f"{folder} has an experiment that runs, its data and a README. Next:")
    show(f"  cd {folder}")
    show("  fedmllm run experiment.toml")


def new(
    kind: Annotated[Literal["algorithm", "scenario", "task"], typer.Argument(show_default=False)],
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
) -> None:
    """Write a part of your own and its test into this folder, to start from; both work as they are."""
    from fedmllm.testing.new import write_part

    for line in write_part(kind, name, Path()):
        show(line)


def doctor(as_json: Json = False, verbose: Verbose = None) -> None:
    """Say what is installed, what this machine has, and whether a small training run works here; about ten seconds."""
    from rich.table import Table

    from fedmllm.cli.doctor import examine

    with showing(verbose) as progress:
        report = examine(progress)
    if as_json:
        print_json(report)
    else:
        table = Table()
        for heading in ("", "", "note"):
            table.add_column(heading)
        for row in report["rows"]:
            table.add_row(row["what"], row["value"], row["note"])
        print_table(table)
        show("All is well." if report["works"] else "Something is wrong: see the notes.")
    if not report["works"]:
        raise typer.Exit(1)
