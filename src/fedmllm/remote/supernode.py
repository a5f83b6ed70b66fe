"""Flower's SuperNode, which runs no code that the server sends.

An app comes to a SuperNode as an archive, and Flower executes what is in it. A site takes one app only: the archive that holds
no code and names the ClientApp of the fedmllm installed here. Any other is answered with Flower's "invalid FAB".

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
LARGEST = 1 << 20
"""Bytes that a file of the archive may have unpacked."""


def harmless(archive: bytes) -> bool:
    """Whether this app is ours: no file but its description, and no entry point but those of fedmllm."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            listed = files.infolist()
            names = [entry.filename for entry in listed]
            if not set(names) <= FILES or len(set(names)) < len(names) or any(e.file_size > LARGEST for e in listed):
                return False
            told = tomllib.loads(files.read("pyproject.toml").decode())
        return bool(told["tool"]["flwr"]["app"]["components"] == COMPONENTS)
    except Exception:  # whatever an archive that is none makes of the readers
        return False


def install() -> None:
    """Put the check where Flower verifies signatures. Raises RuntimeError where this Flower has no such place."""
    from flwr.supercore.fab import Fab
    from flwr.supernode import start_client_internal as flower

    pull: Any = flower._pull_and_store_message
    if not {"get_fab", "trusted_entities"} <= inspect.signature(pull).parameters.keys() or not hasattr(flower, "_verify_fab"):
        raise RuntimeError("this version of flwr verifies apps in another way; install one that fedmllm's flower extra allows")

    def checked(*, get_fab: Any, trusted_entities: Any, **others: Any) -> Any:
        def fetch(hash: str, run_id: int) -> Fab:
            fab = get_fab(hash, run_id)
            # Without this word Flower refuses before it verifies.
            return Fab(fab.hash_str, fab.content, {"valid_license": "checked at the site"})

        return pull(get_fab=fetch, trusted_entities={"fedmllm": "no code but that installed here"}, **others)

    vars(flower).update(_pull_and_store_message=checked, _verify_fab=lambda fab, _: harmless(fab.content))


def main() -> None:
    from flwr.supernode.cli import flower_supernode

    install()
    flower_supernode()


if __name__ == "__main__":
    main()
