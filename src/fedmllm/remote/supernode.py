"""Flower's SuperNode, which executes no code that the server sends.

A SuperNode receives an app as an archive, and plain Flower executes its content. A site accepts one app only: the archive that
contains no code and names the ClientApp of the fedmllm installed here. Any other is answered with Flower's "invalid FAB".

    python -m fedmllm.remote.supernode [options of flower-supernode]
"""

from __future__ import annotations

import inspect
import io
import tomllib
import zipfile
from typing import Any

FILES = {"pyproject.toml", ".info/CONTENT"}
COMPONENTS = {"serverapp": "fedmllm.remote.serverapp:app", "clientapp": "fedmllm.remote.clientapp:app"}
MAX_BYTES = 1 << 20
"""The largest size of an unpacked file of the archive."""


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

        return pull(get_fab=fetch, trusted_entities={"fedmllm": "no code except that installed here"}, **others)

    vars(flower).update(_pull_and_store_message=checked, _verify_fab=lambda fab, _: is_shipped_app(fab.content))


def main() -> None:
    from flwr.supernode.cli import flower_supernode

    install_check()
    flower_supernode()


if __name__ == "__main__":
    main()
