"""The command line. Results go to stdout, everything else to stderr.

Exit status: 0 done, 1 a run failed, 2 bad input (one sentence, no traceback), 130 interrupted (continue with --resume).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import click
import typer

from fedmllm import __version__
from fedmllm.cli import checking, experiments, grids, remote, start, trained
from fedmllm.cli import list as listing
from fedmllm.cli import track as tracking
from fedmllm.cli.common import guarded

app = typer.Typer(
    help="Federated fine-tuning of multimodal language models whose clients hold different modalities.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    suggest_commands=not hasattr(click, "NoSuchCommand"),  # click suggests the closest command itself since it has this error
)

COMMANDS: dict[str, Callable[..., None]] = {
    "init": start.init,
    "new": start.new,
    "doctor": start.doctor,
    "run": experiments.run,
    "baseline": experiments.baseline,
    "check": checking.check,
    "partition": experiments.partition,
    "eval": experiments.evaluate,
    "predict": trained.predict,
    "export": trained.export,
    "track": tracking.track,
    "compare": grids.compare,
    "report": grids.report,
    "sweep": grids.sweep,
    "pack": grids.pack,
    "list": listing.list_parts,
    "keys": remote.keys,
    "client": remote.client,
    "server": remote.server,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(guarded(_command))


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit(0)


if __name__ == "__main__":
    app()
