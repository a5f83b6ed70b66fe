"""Python processes for tests that register parts: parts registered in the test process would show up in other tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fedmllm

_COMMANDS = """
import json, sys
from typer.testing import CliRunner
from fedmllm.cli.app import app

results = []
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, command)
    results.append([done.exit_code, done.stdout, done.stderr])
print(json.dumps(results))
"""


def python(code: str, *arguments: str, folder: Path, **environment: str) -> str:
    """The standard output of `python -c code`, started in `folder`."""
    source = str(Path(fedmllm.__file__).parents[1])
    inherited = {key: value for key, value in os.environ.items() if key != "FEDMLLM_PLUGINS"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**inherited, "PYTHONPATH": source, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands(lines: Sequence[Sequence[object]], folder: Path) -> list[tuple[int, str, str]]:
    """(exit status, standard output, standard error) of `fedmllm …` commands that run one after the other in one process."""
    words: list[list[str]] = [[str(word) for word in line] for line in lines]
    results: list[Any] = json.loads(python(_COMMANDS, json.dumps(words), folder=folder).splitlines()[-1])
    return [(status, out, error) for status, out, error in results]
