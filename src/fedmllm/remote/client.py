"""`fedmllm client`: a site's worker and its SuperNode, kept alive until someone ends them."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmllm.data.dataset import load_split, open_source
from fedmllm.data.manifest import Holding, Manifest
from fedmllm.errors import DataError, RunError
from fedmllm.remote.files import SiteFile
from fedmllm.remote.supervisor import Stop, Supervisor, environment, free_port
from fedmllm.storage.lock import locked


def check(site: SiteFile) -> dict[str, Any]:
    """What the site would tell a server of itself. Raises ConfigError and DataError for what is wrong with its data."""
    _, samples, skipped = load_split(open_source(site.own.task), "train")
    held = [Holding(s.id, 0, s.modalities & site.own.modalities) for s in samples]
    if not any(h.visible for h in held):
        seen = " or ".join(sorted(site.own.modalities))
        raise DataError(f"{site.path}: none of the {len(samples)} samples has {seen}, so there is nothing to train on.")
    ((count, image, text),) = Manifest.of((h for h in held if h.visible), 1).counts().tolist()
    return {"name": site.name, "superlink": site.superlink, "samples": count, "image": image, "text": text, "skipped": skipped}


def keep(site: SiteFile, say: Callable[[str], None]) -> None:
    """Run until SIGTERM or Ctrl-C. All that was started is ended then. Raises RunError where the site is at work already."""
    with locked(site.state / "lock", RunError(f"another `fedmllm client` is at work in {site.state}; end it first.")):
        _keep(site, say)


def _keep(site: SiteFile, say: Callable[[str], None]) -> None:
    env = environment(site.state / "flower") | {"FEDMLLM_CACHE": str(site.state / "cache")}
    # A short path: that of a Unix socket may have 107 bytes. The folder is ours alone, as is the socket.
    folder = Path(tempfile.mkdtemp(prefix="fedmllm-"))
    socket = folder / "worker"

    def node() -> list[str]:
        return [
            sys.executable, "-m", "fedmllm.remote.supernode", "--superlink", site.superlink,
            "--root-certificates", str(site.ca), "--auth-supernode-private-key", str(site.key),
            "--host", "127.0.0.1", "--port", str(free_port()),
            "--node-config", f'worker="{socket}" site="{site.name}"',
        ]  # fmt: skip

    worker = [sys.executable, "-m", "fedmllm.remote.service", str(site.path), str(socket)]
    log = site.state / "supernode.log"
    keepers = [Supervisor("worker", lambda: worker, env, say), Supervisor("SuperNode", node, env, say, log)]
    say(f"looks for work at {site.superlink}; what Flower says of it is in {log}")
    stop = Stop()
    try:
        while not stop():
            for keeper in keepers:
                keeper.look()
            time.sleep(0.2)
    finally:
        for keeper in reversed(keepers):
            keeper.end()
        shutil.rmtree(folder, ignore_errors=True)


__all__ = ["check", "keep"]
