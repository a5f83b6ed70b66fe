"""Flower's SuperNode, which runs no code but ours: `python -m fedmllm.remote.supernode …`.

A SuperLink sends its nodes the app that they are to run. Whoever holds the server could so run anything at a site. Here an
app is refused unless it holds nothing but a file that names the apps of the installed package.
"""

from __future__ import annotations

import io
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fedmllm.remote.processes import die_with_parent

COMPONENTS = {"serverapp": "fedmllm.remote.server_app:app", "clientapp": "fedmllm.remote.client_app:app"}
_FILES = {"pyproject.toml", ".info/CONTENT.jsonl"}


def is_ours(content: bytes) -> bool:
    """Whether this app bundle is the one that `fedmllm` submits: no file but pyproject.toml, which names our apps and asks for
    nothing to be installed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as bundle:
            if not set(bundle.namelist()) <= _FILES or len(bundle.namelist()) > len(_FILES):
                return False
            if sum(entry.file_size for entry in bundle.infolist()) > 1 << 20:
                return False
            project = tomllib.loads(bundle.read("pyproject.toml").decode())
        named: Any = project["tool"]["flwr"]["app"]["components"]
        return bool(named == COMPONENTS) and not project["project"].get("dependencies")
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, AttributeError, OSError):
        return False


def main() -> None:
    from flwr.supernode import start_client_internal as internal
    from flwr.supernode.cli import flower_supernode

    die_with_parent()
    connect: Callable[..., Any] = internal._init_connection
    start: Callable[..., Any] = internal.start_client_internal

    @contextmanager
    def connection(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with connect(*args, **kwargs) as (node, receive, send, get_run, get_fab, *rest):

            def get_ours(*what: Any) -> Any:
                fab = get_fab(*what)
                # Flower looks at this before it asks whether an app may run.
                return replace(fab, verifications={**fab.verifications, "valid_license": "yes"})

            yield (node, receive, send, get_run, get_ours, *rest)

    def start_strict(**kwargs: Any) -> None:
        start(**{**kwargs, "trusted_entities": {"fedmllm": ""}})

    # The hooks of Flower's own check of signed apps: a refused app is answered with an error, and the node lives on.
    internal._init_connection = connection
    internal._verify_fab = lambda fab, _: is_ours(fab.content)
    flower_supernode.start_client_internal = start_strict
    flower_supernode.flower_supernode()


if __name__ == "__main__":
    main()
