"""Flower's command line, connected to one SuperLink. Every call starts a process."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tomli_w

from fedmllm.errors import ConfigError
from fedmllm.remote.files import FederationFile
from fedmllm.remote.supervisor import environment, tool
from fedmllm.storage.atomic import write_atomically

CONNECTION = "here"
"""The name of the connection to the SuperLink in Flower's configuration file."""
START = 180.0
"""Seconds within which the SuperLink must answer; on a busy machine it takes a minute to load its libraries."""


class RunFailed(RuntimeError):  # noqa: N818 (it says what happened)
    """The run failed, and has no retries left."""


class FlowerCli:
    """The command `flwr` with a configuration of its own. `env` is the environment of all of Flower's processes."""

    def __init__(self, federation: FederationFile) -> None:
        home = federation.state / "flower"
        host = "127.0.0.1" if federation.host in ("0.0.0.0", "[::]", "::") else federation.host
        connection = {"address": f"{host}:{federation.port}", "root-certificates": str(federation.ca)}
        config = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
        write_atomically(home / "config.toml", tomli_w.dumps(config).encode())
        self.env = environment(home) | {"FEDMLLM_CACHE": str(federation.state / "cache")}
        self._federation, self._host, self._flwr = federation, host, tool("flwr")

    def _call(self, *arguments: str, seconds: float = 60.0) -> dict[str, Any]:
        """The JSON that a command prints; empty if it fails, as it does while the SuperLink is away."""
        try:
            completed = subprocess.run(
                [self._flwr, *arguments, "--format", "json"], env=self.env, capture_output=True, text=True, timeout=seconds
            )
            reply: dict[str, Any] = json.loads(completed.stdout[completed.stdout.index("{") :])
            return reply
        except (subprocess.TimeoutExpired, ValueError):
            return {}

    def wait_until_ready(self, wait: Callable[[float], None], log: Path) -> set[str]:
        """The ids of the registered nodes, as soon as the SuperLink answers; `wait(seconds)` passes the time.

        Raises RunFailed after `START` seconds.
        """
        end, reply = time.monotonic() + START, dict[str, Any]()
        while not reply.get("success"):
            if time.monotonic() > end:
                raise RunFailed(f"the SuperLink does not answer at {self._federation.address}; its log is {log}.")
            wait(0.2)
            if self._listens():
                reply = self._call("supernode", "ls", CONNECTION)
        return {str(node["node-id"]) for node in reply["nodes"] if node["status"] != "unregistered"}

    def _listens(self) -> bool:
        """Whether the SuperLink accepts connections, found out without starting a process."""
        try:
            with socket.create_connection((self._host.strip("[]"), self._federation.port), timeout=5):
                return True
        except OSError:
            return False

    def register_sites(self, nodes: set[str]) -> None:
        """Register the sites of the federation file, and remove all other nodes. Raises ConfigError if a key is refused.

        `registered.json` stores the key and the node of each site, because the SuperLink does not say which key a node has.
        """
        file = self._federation.state / "registered.json"
        stored: dict[str, dict[str, str]] = json.loads(file.read_text()) if file.is_file() else {}
        keys = {name: path.read_text() for name, path in self._federation.sites.items()}
        registered = {n: entry for n, entry in stored.items() if keys.get(n) == entry["key"] and entry["node"] in nodes}
        new = [name for name in keys if name not in registered]
        with ThreadPoolExecutor() as pool:  # each call takes seconds, most of them for Python's imports
            outdated = nodes - {entry["node"] for entry in registered.values()}
            list(pool.map(lambda node: self._call("supernode", "unregister", node, CONNECTION), outdated))
            commands = (("register", str(self._federation.sites[name]), CONNECTION, "--name", name) for name in new)
            replies = dict(zip(new, pool.map(lambda words: self._call("supernode", *words), commands), strict=True))
        for name, reply in replies.items():
            if reply.get("success"):
                registered[name] = {"key": keys[name], "node": str(reply["node-id"])}
        write_atomically(file, json.dumps(registered).encode())
        for name, reply in replies.items():
            if not reply.get("success"):
                raise ConfigError(f"the SuperLink does not register sites.{name} ({reply.get('error-message')}).")

    def submit(self, app: Path, settings: str) -> str:
        """The id of the new run; empty if the SuperLink does not accept it."""
        reply = self._call("run", str(app), CONNECTION, "-c", settings)
        return str(reply["run-id"]) if reply.get("success") else ""

    def status(self, run_id: str) -> str:
        """The status of a run, such as "finished:failed"; empty if Flower does not answer."""
        runs = self._call("ls", CONNECTION, "--run-id", run_id).get("runs") or [{}]
        return str(runs[0].get("status", ""))

    def stop(self, run_id: str) -> None:
        self._call("stop", run_id, CONNECTION, seconds=20)

    def wait_until_finished(self, run_id: str, pause: float) -> None:
        """Wait a little until Flower notices that the run is over, so that its database is right."""
        for _ in range(10):
            if self.status(run_id).startswith("finished:"):
                return
            time.sleep(pause)
