"""The command `track`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmllm.cli.output import show


def track(
    directories: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", show_default=False)],
    trackers: Annotated[
        list[str] | None, typer.Option("--with", metavar="TRACKER", help="By default tensorboard; repeatable.")
    ] = None,
    project: Annotated[str | None, typer.Option("--project", help="By default the name of the experiment.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="For trackers that write files; by default the RUN_DIR.")
    ] = None,
) -> None:
    """Show runs, finished or not, in trackers such as TensorBoard, as they would have been shown while they went on."""
    from fedmllm import config
    from fedmllm.runs.tracking import replay
    from fedmllm.storage.run_dir import RunDir

    chosen = {"with": trackers or ["tensorboard"], "project": project, "folder": None if folder is None else str(folder)}
    table = config.validate({"task": {"name": "any"}, "track": chosen}).track  # a task is required, and not used
    table.check()
    for directory in directories:
        rounds = replay(RunDir(directory), table)
        show(f"{directory}: {rounds} rounds are in {' and '.join(table.trackers)}")
