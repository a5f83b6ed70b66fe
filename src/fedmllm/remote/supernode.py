"""Flower's SuperNode, which executes no code that the server sends, and answers no other user of this machine.

A SuperNode receives an app as an archive, and plain Flower executes its content. A site accepts one app only: the archive that
contains no code and names the ClientApp of the fedmllm installed here. Any other is answered with Flower's "invalid FAB".

    python -m fedmllm.remote.supernode [options of flower-supernode]
"""

from __future__ import annotations

import inspect
import io
import os
import time
import tomllib
import zipfile
from typing import Any

from fedmllm.remote.superlink import LocalOnly

FILES = {"pyproject.toml", ".info/CONTENT"}
COMPONENTS = {"serverapp": "fedmllm.remote.serverapp:app", "clientapp": "fedmllm.remote.clientapp:app"}
MAX_BYTES = 1 << 20
"""The largest size of an unpacked file of the archive."""
POLL, RECONNECT = 0.5, 5
"""Seconds between two queries for messages, and the most between two attempts to reach the server. Flower's own, 3 and 20, are
longer than a round of a small model."""
HEARTBEAT = "FEDMLLM_HEARTBEAT"
"""The environment variable with the seconds between two heartbeats, 10 or more; without it Flower's 30. After twice that time,
the server considers a node that was killed offline, and admits its successor."""


def is_shipped_app(archive: bytes) -> bool:
    """Whether the archive contains nothing but a description with the entry points of fedmllm."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            entries = files.infolist()
            names = [entry.filename for entry in entries]
            if not set(names) <= FILES or len(set(names)) < len(names) or any(e.file_size > MAX_BYTES for e in entries):
                return False
            description = tomllib.loads(files.read("pyproject.toml").decode())
        return bool(description["tool"]["flwr"]["app"]["components"] == COMPONENTS)
    except Exception:  # whatever the readers raise for a malformed archive
        return False


def install_check() -> None:
    """Put the check where Flower verifies signatures. Raises RuntimeError if this version of Flower has no such place."""
    from flwr.supercore.fab import Fab
    from flwr.supernode import start_client_internal as flower

    pull: Any = flower._pull_and_store_message
    if not {"get_fab", "trusted_entities"} <= inspect.signature(pull).parameters.keys() or not hasattr(flower, "_verify_fab"):
        raise RuntimeError("this version of flwr verifies apps in another way; install one that fedmllm's flower extra allows")

    def checked(*, get_fab: Any, trusted_entities: Any, **others: Any) -> Any:
        def fetch(hash: str, run_id: int) -> Fab:
            fab = get_fab(hash, run_id)
            # Without this entry Flower refuses the app before it verifies it.
            return Fab(fab.hash_str, fab.content, {"valid_license": "checked at the site"})

        trusted = {"fedmllm": "no code except that installed here"}
        while (run_id := pull(get_fab=fetch, trusted_entities=trusted, **others)) is None:
            time.sleep(POLL)
        return run_id

    vars(flower).update(_pull_and_store_message=checked, _verify_fab=lambda fab, _: is_shipped_app(fab.content))


def restrict_runtime() -> None:
    """Answer the processes of this user only: whoever reaches the Runtime API can take a message and answer in its place."""
    from flwr.supernode import main as runtime

    create: Any = runtime.create_app

    def restricted(*args: Any, **options: Any) -> Any:
        app = create(*args, **options)
        app.add_middleware(LocalOnly, fleet=False)  # the last one that is added comes first
        return app

    vars(runtime)["create_app"] = restricted


def set_intervals() -> None:
    """Set how often the node reports to the server, and how often it tries to reach it."""
    from flwr.supercore import heartbeat
    from flwr.supercore.retry import http_retry
    from flwr.supernode import fleet_http_connection

    vars(http_retry)["MAX_RETRY_DELAY"] = RECONNECT
    if HEARTBEAT in os.environ:
        for module in (heartbeat, fleet_http_connection):
            vars(module)["HEARTBEAT_DEFAULT_INTERVAL"] = int(os.environ[HEARTBEAT])


def main() -> None:
    from flwr.supernode.cli import flower_supernode

    install_check()
    restrict_runtime()
    set_intervals()
    flower_supernode()


if __name__ == "__main__":
    main()
