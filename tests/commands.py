"""The command line, called as a user would type it."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import typer
from click.testing import CliRunner, Result

from fedmllm.cli.app import app
from fedmllm.experiment import processes

COMMAND = typer.main.get_command(app)
"""Built once: typer reads the options of all commands again each time."""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(COMMAND, [str(a) for a in arguments])


def run(*arguments: object) -> dict[str, Any]:
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def settings(**values: object) -> list[str]:
    """`algorithm__name="flora"` as `--set algorithm.name=flora`."""
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


@contextmanager
def forked(stderr: Path, *arguments: object, prepare: Callable[[], None] | None = None) -> Iterator[BaseProcess]:
    """The command in a process of its own, with its standard error in a file; `prepare` is called there first.

    The process is forked, as a sweep's runs are, from a server that has imported torch and transformers already. If it is a
    sweep, its runs are forked from the same server.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(processes.PRELOAD)
    process = context.Process(target=_prepared, args=(prepare, stderr, [str(a) for a in arguments]))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _prepared(prepare: Callable[[], None] | None, stderr: Path, command: list[str]) -> None:
    # Python would start a second server, which imports everything again, though this process knows the one it comes from.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    if prepare is not None:
        prepare()
    processes._run(command, str(stderr), threads=1)
