"""`fedmllm server`: a SuperLink, the sites' keys registered with it, and one run, submitted again until it is through."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

from fedmllm.errors import ConfigError, RunError
from fedmllm.remote.files import FederationFile
from fedmllm.remote.supervisor import Stop, Supervisor, environment, tool
from fedmllm.storage.atomic import write_atomically
from fedmllm.storage.lock import locked
from fedmllm.storage.run_dir import RunDir

CONNECTION = "here"
POLL = 0.5
"""Seconds between two looks at the run's files."""
ASK = 10.0
"""Seconds between two questions to Flower, each of which is a process: how long a run that was killed is not missed."""
APP = Path(__file__).with_name("app")


class Interrupted(KeyboardInterrupt):
    """The server was asked to end before the run was through."""


class RunFailed(RuntimeError):  # noqa: N818 (it says what happened)
    """The run came to nothing as often as it may."""


class Flower:
    """Flower's command line, spoken to one SuperLink."""

    def __init__(self, federation: FederationFile) -> None:
        home = federation.state / "flower"
        host = "127.0.0.1" if federation.host in ("0.0.0.0", "[::]", "::") else federation.host
        connection = {"address": f"{host}:{federation.port}", "root-certificates": str(federation.ca)}
        config = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
        write_atomically(home / "config.toml", tomli_w.dumps(config).encode())
        self.env = environment(home) | {"FEDMLLM_CACHE": str(federation.state / "cache")}
        self._flwr = tool("flwr")

    def ask(self, *arguments: str, seconds: float = 60.0) -> dict[str, Any] | None:
        """What a command says, as JSON; None where it failed, which is what it does while the SuperLink is away."""
        try:
            done = subprocess.run(
                [self._flwr, *arguments, "--format", "json"], env=self.env, capture_output=True, text=True, timeout=seconds
            )
            said: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
            return said
        except (subprocess.TimeoutExpired, ValueError):
            return None


class Server:
    """`out` is the run's directory. `say` is told what happens."""

    def __init__(self, federation: FederationFile, out: Path, resume: bool, say: Callable[[str], None]) -> None:
        self._federation, self._say = federation, say
        self._run, self._resume = RunDir(out.absolute()), resume
        self._experiment = federation.state / "experiment.toml"
        self._outcome = federation.state / "outcome.json"  # of the last submission, each of which has its own
        self._app = federation.state / "app"
        self._log = federation.state / "superlink.log"
        self._told = 0
        self._stop = Stop()

    def run(self) -> dict[str, Any]:
        """The run's result. Raises ConfigError or RunError for what a user can mend, RunFailed, and Interrupted."""
        state = self._federation.state
        with locked(state / "lock", RunError(f"another `fedmllm server` is at work in {state}; end it first.")):
            self._probe()
            write_atomically(self._experiment, self._federation.experiment.toml().encode())
            shutil.rmtree(self._app, ignore_errors=True)
            # A copy with nothing beside it, as Flower sends all that it finds.
            self._app.mkdir()
            shutil.copy(APP / "pyproject.toml", self._app)
            flower = Flower(self._federation)
            superlink = Supervisor("SuperLink", self._command, flower.env, self._say, self._log)
            try:
                superlink.look()
                self._register(flower, superlink)
                return self._until_done(flower, superlink)
            finally:
                superlink.end()

    def _probe(self) -> None:
        """Raises RunError where the SuperLink could not listen: it would only say so in its log, and be started for ever."""
        family = socket.AF_INET6 if ":" in self._federation.host else socket.AF_INET
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((self._federation.host.strip("[]"), self._federation.port))
        except OSError as error:
            where = self._federation.address
            raise RunError(f"cannot listen on {where} ({error.strerror}); end what does, or change address.") from None

    def _command(self) -> list[str]:
        federation = self._federation
        return [
            sys.executable, "-m", "fedmllm.remote.superlink", "--host", federation.host.strip("[]"), "--port",
            str(federation.port), "--ssl-ca-certfile", str(federation.ca), "--ssl-certfile", str(federation.certificate),
            "--ssl-keyfile", str(federation.key), "--enable-supernode-auth",
            "--database", str(federation.state / "superlink.db"),
        ]  # fmt: skip

    def _wait(self, superlink: Supervisor, seconds: float) -> None:
        """Look after the SuperLink for a while. Raises Interrupted."""
        end = time.monotonic() + seconds
        while True:
            if self._stop():
                raise Interrupted
            superlink.look()
            if time.monotonic() >= end:
                return
            time.sleep(0.1)

    def _register(self, flower: Flower, superlink: Supervisor) -> None:
        """Let in the sites of the file, and no one else: a site that was struck from it is struck from the SuperLink too.

        `registered.json` has each site's key and node, as the SuperLink does not tell the one of the other.
        """
        end = time.monotonic() + 60
        while (there := flower.ask("supernode", "ls", CONNECTION)) is None or not there.get("success"):
            if time.monotonic() > end:
                raise RunFailed(f"the SuperLink does not answer at {self._federation.address}; its log is {self._log}.")
            self._wait(superlink, 0.5)
        nodes = {str(node["node-id"]) for node in there["nodes"] if node["status"] != "unregistered"}
        file = self._federation.state / "registered.json"
        noted: dict[str, dict[str, str]] = json.loads(file.read_text()) if file.is_file() else {}
        keys = {name: path.read_text() for name, path in self._federation.sites.items()}
        kept = {n: one for n, one in noted.items() if keys.get(n) == one["key"] and one["node"] in nodes}
        for node in nodes - {one["node"] for one in kept.values()}:
            flower.ask("supernode", "unregister", node, CONNECTION)
        for name in keys.keys() - kept.keys():
            said = flower.ask("supernode", "register", str(self._federation.sites[name]), CONNECTION, "--name", name)
            if not said or not said.get("success"):
                raise ConfigError(f"the SuperLink does not register sites.{name} ({(said or {}).get('error-message')}).")
            kept[name] = {"key": keys[name], "node": str(said["node-id"])}
            write_atomically(file, json.dumps(kept).encode())
        write_atomically(file, json.dumps(kept).encode())
        self._say(f"sites {', '.join(keys)} may connect to {self._federation.address}")

    def _until_done(self, flower: Flower, superlink: Supervisor) -> dict[str, Any]:
        left, done = self._federation.retries, self._rounds()
        self._told = done
        number = 0
        while True:
            # A run that was given up may still say something.
            number += 1
            self._outcome = self._federation.state / f"outcome-{os.getpid()}-{number}.json"
            run_id = self._submit(flower, superlink)
            status = self._follow(flower, superlink, run_id)
            if self._run.complete:
                self._see_off(flower, run_id)
                return self._run.result()
            outcome = json.loads(self._outcome.read_text()) if self._outcome.is_file() else {}
            self._outcome.unlink(missing_ok=True)
            why = outcome.get("why", f"it {status}")
            if outcome.get("status") == 2:
                raise RunError(str(why))
            left, done = (left - 1 if self._rounds() == done else self._federation.retries), self._rounds()
            if left < 0:
                raise RunFailed(str(why))
            self._say(f"the run failed after round {done} ({why}); it goes on from there")
            self._resume = True
            self._wait(superlink, 2.0)

    def _tell(self) -> None:
        """Say what came of the rounds that are new."""
        for record in RunDir(self._run.path).rounds()[self._told :]:
            self._told = int(record["round"]) + 1
            rounds, refused = self._federation.experiment.train.rounds, record["refused"]
            took_part = len(record["sampled"]) - len(refused)
            told = [
                f"{took_part} of {len(record['sampled'])} sites",
                f"loss {record['loss']:.4f}",
                f"{record['seconds']:.0f} s",
            ]
            names = self._federation.experiment.fleet.options["sites"]
            told += [f"without {names[one['client']]}: {one['why']}" for one in refused]
            self._say(f"round {self._told} of {rounds}: {', '.join(told)}")

    def _see_off(self, flower: Flower, run_id: str) -> None:
        """Wait a little until Flower knows that the run is over, so that its books are right."""
        for _ in range(10):
            if _status(flower.ask("ls", CONNECTION, "--run-id", run_id)).startswith("finished:"):
                return
            time.sleep(POLL)

    def _rounds(self) -> int:
        return len(RunDir(self._run.path).rounds())

    def _submit(self, flower: Flower, superlink: Supervisor) -> str:
        settings = {"experiment": self._experiment, "out": self._run.path, "outcome": self._outcome}
        told = " ".join(f"{key}={json.dumps(str(value))}" for key, value in settings.items())
        told += f" resume={'true' if self._resume else 'false'}"
        for _ in range(60):
            said = flower.ask("run", str(self._app), CONNECTION, "-c", told)
            if said and said.get("success"):
                self._say(f"run {said['run-id']} submitted")
                return str(said["run-id"])
            self._wait(superlink, 1.0)
        raise RunFailed(f"the SuperLink does not take the run; its log is {self._log}.")

    def _follow(self, flower: Flower, superlink: Supervisor, run_id: str) -> str:
        """How the run ended, in Flower's word."""
        asked = time.monotonic()
        while True:
            try:
                self._wait(superlink, POLL)
            except Interrupted:
                flower.ask("stop", run_id, CONNECTION, seconds=20)
                raise
            self._tell()
            if self._run.complete or self._outcome.is_file():  # its process is about to end; Flower hears of it later
                return "ended"
            if time.monotonic() - asked < ASK:
                continue
            status = _status(flower.ask("ls", CONNECTION, "--run-id", run_id))
            asked = time.monotonic()
            if status.startswith("finished:"):
                return status.removeprefix("finished:")


def _status(said: dict[str, Any] | None) -> str:
    """The status of the one run that Flower was asked about; empty where it does not say."""
    return str(((said or {}).get("runs") or [{}])[0].get("status", ""))


__all__ = ["Interrupted", "RunFailed", "Server"]
