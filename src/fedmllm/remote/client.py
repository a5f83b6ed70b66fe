"""`fedmllm client`: a site's worker and its SuperNode side by side, kept running until someone ends them."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmllm.data.manifest import Holding, Manifest
from fedmllm.errors import ConfigError, DataError
from fedmllm.experiment import load_split
from fedmllm.remote.files import SiteFile
from fedmllm.remote.processes import Process, environment, free_port

Tell = Callable[[str], None]


def check_site(site: SiteFile) -> dict[str, Any]:
    """What the site brings: `samples`, of them `image` and `text` used, and how many were skipped.

    Raises ConfigError for a key that others may read, DataError where there is nothing to train on.
    """
    key = Path(site.key)
    if key.stat().st_mode & 0o077:
        raise ConfigError(f"{key}: others may read this private key; change it with `chmod 600 {key}`.")
    if b"PRIVATE KEY" not in key.read_bytes():
        raise ConfigError(f"{key}: is no private key; make one with `fedmllm keys … --site {site.name}`.")
    if b"BEGIN CERTIFICATE" not in Path(site.ca).read_bytes():
        raise ConfigError(f"{site.ca}: is no certificate; it is the file ca.crt that the server's operator gives out.")
    _, samples, skipped = load_split(site.task, "train")
    sees = frozenset(site.modalities)
    held = [Holding(s.id, 0, s.modalities & sees) for s in samples if s.modalities & sees]
    if not held:
        raise DataError(
            f"task: none of the {len(samples)} samples has {' or '.join(sorted(sees))}, so there is nothing to train on."
        )
    count, image, text = Manifest.of(held, 1).counts()[0].tolist()
    return {"name": site.name, "samples": count, "image": image, "text": text, "skipped": skipped + len(samples) - count}


class Client:
    """The two processes of a site. The worker's socket is in a folder that only its user may enter."""

    def __init__(self, file: Path, site: SiteFile, tell: Tell, slowest: float = 60.0) -> None:
        self._tell = tell
        self._folder = tempfile.TemporaryDirectory(prefix="fedmllm-")  # short: the path of a socket has at most 107 bytes
        socket = Path(self._folder.name) / "worker.sock"
        state = Path(site.state)
        env = environment(state / "flower")
        node = json.dumps(str(socket))

        def supernode() -> list[str]:
            return [
                sys.executable, "-m", "fedmllm.remote.supernode", "--superlink", site.superlink, "--root-certificates", site.ca,
                "--auth-supernode-private-key", site.key, "--host", "127.0.0.1", "--port", str(free_port()),
                "--node-config", f"worker={node}",
            ]  # fmt: skip

        worker = [sys.executable, "-m", "fedmllm.remote.service", str(file.resolve()), str(socket)]
        self.worker = Process("the worker", lambda: worker, env, None, slowest)
        self.supernode = Process("the SuperNode", supernode, env, state / "supernode.log", slowest)

    def run(self) -> None:
        """Until KeyboardInterrupt."""
        try:
            while True:
                for process in (self.worker, self.supernode):
                    if told := process.tend():
                        self._tell(told)
                time.sleep(0.3)
        finally:
            for process in (self.supernode, self.worker):
                process.stop()
            self._folder.cleanup()


def run_client(file: Path, site: SiteFile, tell: Tell) -> None:
    """Check, start, and keep running until KeyboardInterrupt. Raises UserError."""
    found = check_site(site)
    Path(site.state).mkdir(0o700, parents=True, exist_ok=True)
    tell(f"{site.name}: {found['samples']} samples, {found['image']} with an image and {found['text']} with a text")
    tell(f"connecting to {site.superlink}; what Flower says is in {Path(site.state) / 'supernode.log'}")
    Client(file, site, tell).run()


__all__ = ["Client", "check_site", "run_client"]
