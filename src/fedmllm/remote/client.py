"""`fedmllm client`: keeps a site's worker and its SuperNode alive until the command is stopped."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmllm.data.dataset import load_split, open_source
from fedmllm.data.manifest import Manifest
from fedmllm.errors import DataError, RunError
from fedmllm.remote.files import SiteFile, private_folder
from fedmllm.remote.supervisor import Supervisor, environment, free_port, stop, stop_signal
from fedmllm.storage.atomic import remove_leftovers
from fedmllm.storage.lock import locked


def check(site: SiteFile) -> dict[str, Any]:
    """What the site would report to a server. Raises ConfigError or DataError if its data cannot be used."""
    _, samples, skipped = load_split(open_source(site.data.task), "train")
    holdings = site.data.holdings(samples, 0)
    if not holdings:
        modalities = " or ".join(sorted(site.data.modalities))
        raise DataError(f"{site.path}: none of the {len(samples)} samples has {modalities}, so there is nothing to train on.")
    ((count, image, text),) = Manifest.of(holdings, 1).counts().tolist()
    return {"name": site.name, "superlink": site.superlink, "samples": count, "image": image, "text": text, "skipped": skipped}


def serve(site: SiteFile, report: Callable[[str], None]) -> None:
    """Take part in runs until SIGTERM or Ctrl-C, then end all processes that were started.

    Raises RunError if another process already serves the site, ConfigError if other users may open its state.
    """
    private_folder(site.state, site.path)
    refusal = RunError(f"another `fedmllm client` is running in {site.state}; stop it first.")
    with (
        locked(site.state / "lock", refusal),
        # A short path, because the path of a Unix socket is limited to 107 bytes. Only this user can open the folder.
        tempfile.TemporaryDirectory(prefix="fedmllm-", ignore_cleanup_errors=True) as folder,
    ):
        remove_leftovers(site.state, "**/*")
        env = environment(site.state / "flower") | {"FEDMLLM_CACHE": str(site.state / "cache")}
        socket, log = str(Path(folder, "worker")), site.state / "supernode.log"

        def node_command() -> list[str]:
            return [
                sys.executable, "-m", "fedmllm.remote.supernode", "--superlink", site.superlink,
                "--root-certificates", str(site.ca), "--auth-supernode-private-key", str(site.key),
                "--host", "127.0.0.1", "--port", str(free_port()),
                "--node-config", f'worker="{socket}" site="{site.name}"',
            ]  # fmt: skip

        worker_command = [sys.executable, "-m", "fedmllm.remote.service", str(site.path), socket]
        supervisors = [
            Supervisor("worker", lambda: worker_command, env, report),
            Supervisor("SuperNode", node_command, env, report, log),
        ]
        report(f"waits for runs at {site.superlink}; Flower's output goes to {log}")
        stopped = stop_signal()
        try:
            while not stopped():
                for supervisor in supervisors:
                    supervisor.check()
                time.sleep(0.2)
        finally:
            stop(*supervisors)
