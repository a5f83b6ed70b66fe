"""The command line, called as a user would type it."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from fedmllm.cli.app import app


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run(*arguments: object) -> dict[str, Any]:
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(done.stdout)
    return result
