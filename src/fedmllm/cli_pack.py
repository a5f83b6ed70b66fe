"""`fedmllm pack`: a sweep as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmllm.printing import Json, print_json


def pack(
    directory: Annotated[Path, typer.Argument(metavar="SWEEP_DIR", help="A folder that a sweep made.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", metavar="FILE.tar.xz", help="The archive.")],
    as_json: Json = False,
) -> None:
    """Pack a sweep's complete runs, without adapters and checkpoints, into one small file that report and compare read."""
    from fedmllm import archive

    runs, size = archive.pack(directory, to)
    if as_json:
        print_json({"file": str(to), "runs": runs, "bytes": size})
    else:
        typer.echo(f"{to}: {runs} complete runs in {size:,} bytes")
