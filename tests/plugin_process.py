"""Python processes for tests that register parts: parts registered in the test process would show up in other tests.

They are forked from a server that has imported torch and transformers, as a sweep's runs are.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from typer.testing import CliRunner

from fedmllm.cli.app import app
from fedmllm.experiment.processes import PRELOAD
from fedmllm.registry import PLUGINS


def python(code: str, *arguments: str, folder: Path, **environment: str) -> str:
    """The standard output of `python -c code`, started in `folder`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    inherited = {key: value for key, value in os.environ.items() if key != PLUGINS}
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as error:
        outputs = out.name, error.name
        child = context.Process(target=_execute, args=(code, arguments, folder, inherited | environment, outputs))
        child.start()
        child.join()
        printed = out.read()
        assert child.exitcode == 0, printed + error.read()
    return printed


def _execute(code: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], outputs: Sequence[str]) -> None:
    for number, name in enumerate(outputs, start=1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[:0] = ["-c", *arguments], [""]
    exec(code, {"__name__": "__main__"})


def commands(lines: Sequence[Sequence[object]], folder: Path) -> list[tuple[int, str, str]]:
    """(exit status, standard output, standard error) of `fedmllm …` commands that run one after the other in one process."""
    words: list[list[str]] = [[str(word) for word in line] for line in lines]
    output = python("import plugin_process; plugin_process.execute_commands()", json.dumps(words), folder=folder)
    return [(status, out, error) for status, out, error in json.loads(output.splitlines()[-1])]


def execute_commands() -> None:
    """In the child: execute the commands in its first argument and print their results."""
    results = []
    for command in json.loads(sys.argv[1]):
        done = CliRunner().invoke(app, command)
        results.append([done.exit_code, done.stdout, done.stderr])
    print(json.dumps(results))
