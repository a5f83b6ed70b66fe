"""`fedmllm server`: runs a SuperLink, registers the sites' keys with it, and submits one run until it is finished."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmllm.errors import RunError
from fedmllm.remote.files import FederationFile, private_folder
from fedmllm.remote.flower import FlowerCli, RunFailed
from fedmllm.remote.supervisor import Supervisor, stop, stop_signal
from fedmllm.storage.atomic import remove_leftovers, write_atomically
from fedmllm.storage.lock import locked
from fedmllm.storage.run_dir import RunDir

POLL = 0.5
"""Seconds between two looks at the run's files."""
STATUS_POLL, STATUS_POLL_AFTER_RESTART = 30.0, 10.0
"""Seconds between two queries of the run's status, each of which starts a process. Only a run whose process was killed needs
them, as it is together with the SuperLink: any other leaves a result or an outcome."""
APP = Path(__file__).with_name("app")


class Interrupted(KeyboardInterrupt):
    """The server was stopped before the run was finished."""


class Server:
    """Serves one run. `out` is the run's directory; `report` receives progress messages."""

    def __init__(self, federation: FederationFile, out: Path, resume: bool, report: Callable[[str], None]) -> None:
        self._federation, self._report = federation, report
        self._run, self._resume = RunDir(out.absolute()), resume
        self._experiment = federation.state / "experiment.toml"
        self._app = federation.state / "app"
        self._log = federation.state / "superlink.log"
        self._reported_rounds = 0
        self._stop = stop_signal()

    def run(self) -> dict[str, Any]:
        """The run's result. Raises ConfigError or RunError for what a user can correct, RunFailed, and Interrupted."""
        state = private_folder(self._federation.state, self._federation.path)  # its database holds every site's updates
        with locked(state / "lock", RunError(f"another `fedmllm server` is running in {state}; stop it first.")):
            self._check_port()
            remove_leftovers(state)
            write_atomically(self._experiment, self._federation.experiment.toml(track=True).encode())
            shutil.rmtree(self._app, ignore_errors=True)
            # A copy in a folder of its own, because Flower sends every file of the folder to the sites.
            self._app.mkdir()
            shutil.copy(APP / "pyproject.toml", self._app)
            flower = FlowerCli(self._federation)
            superlink = Supervisor("SuperLink", self._command, flower.env, self._report, self._log)
            try:
                superlink.check()
                nodes = flower.wait_until_ready(lambda seconds: self._wait(superlink, seconds), self._log)
                flower.register_sites(nodes)
                sites = ", ".join(self._federation.sites)
                self._report(f"sites {sites} may connect to {self._federation.address}")
                return self._run_until_finished(flower, superlink)
            finally:
                stop(superlink)

    def _check_port(self) -> None:
        """Raises RunError if the SuperLink could not listen: it would only log the error and be restarted forever."""
        family = socket.AF_INET6 if ":" in self._federation.host else socket.AF_INET
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((self._federation.host.strip("[]"), self._federation.port))
        except OSError as error:
            address = self._federation.address
            raise RunError(
                f"cannot listen on {address} ({error.strerror}); stop the process that does, or change address."
            ) from None

    def _command(self) -> list[str]:
        federation = self._federation
        return [
            sys.executable, "-m", "fedmllm.remote.superlink", "--host", federation.host.strip("[]"), "--port",
            str(federation.port), "--ssl-ca-certfile", str(federation.ca), "--ssl-certfile", str(federation.certificate),
            "--ssl-keyfile", str(federation.key), "--enable-supernode-auth",
            "--database", str(federation.state / "superlink.db"),
        ]  # fmt: skip

    def _wait(self, superlink: Supervisor, seconds: float) -> None:
        """Supervise the SuperLink for some seconds. Raises Interrupted."""
        end = time.monotonic() + seconds
        while True:
            if self._stop():
                raise Interrupted
            superlink.check()
            if time.monotonic() >= end:
                return
            time.sleep(0.1)

    def _run_until_finished(self, flower: FlowerCli, superlink: Supervisor) -> dict[str, Any]:
        retries, done = self._federation.retries, len(self._run.rounds())
        self._reported_rounds = done
        number = 0
        while True:
            # A new file per submission, because the process of an earlier one may still write its outcome.
            number += 1
            self._outcome = self._federation.state / f"outcome-{os.getpid()}-{number}.json"
            run_id = self._submit(flower, superlink)
            status = self._follow(flower, superlink, run_id)
            if self._run.complete:
                flower.wait_until_finished(run_id, POLL)
                return self._run.result()
            outcome = json.loads(self._outcome.read_text()) if self._outcome.is_file() else {}
            self._outcome.unlink(missing_ok=True)
            reason = str(outcome.get("why", f"it {status}"))
            if outcome.get("status") == 2:
                raise RunError(reason)
            done_before, done = done, len(self._run.rounds())
            retries = retries - 1 if done == done_before else self._federation.retries
            if retries < 0:
                raise RunFailed(reason)
            self._report(f"the run failed after round {done} ({reason}); it continues from there")
            self._resume = True
            self._wait(superlink, 2.0)

    def _submit(self, flower: FlowerCli, superlink: Supervisor) -> str:
        settings = {"experiment": self._experiment, "out": self._run.path, "outcome": self._outcome}
        text = " ".join(f"{key}={json.dumps(str(value))}" for key, value in settings.items())
        text += f" resume={'true' if self._resume else 'false'}"
        for _ in range(60):
            if run_id := flower.submit(self._app, text):
                self._report(f"run {run_id} submitted")
                return run_id
            self._wait(superlink, 1.0)
        raise RunFailed(f"the SuperLink does not accept the run; its log is {self._log}.")

    def _follow(self, flower: FlowerCli, superlink: Supervisor, run_id: str) -> str:
        """How the run ended, in Flower's word."""
        queried, restarts = time.monotonic(), superlink.restarts
        while True:
            try:
                self._wait(superlink, POLL)
            except Interrupted:
                flower.stop(run_id)
                raise
            self._report_rounds()
            if self._run.complete or self._outcome.is_file():  # its process is about to end; Flower notices later
                return "ended"
            pause = STATUS_POLL_AFTER_RESTART if superlink.restarts > restarts else STATUS_POLL
            if time.monotonic() - queried < pause:
                continue
            status = flower.status(run_id)
            queried = time.monotonic()
            if status.startswith("finished:"):
                return status.removeprefix("finished:")

    def _report_rounds(self) -> None:
        """Report the outcome of new rounds."""
        names = self._federation.experiment.fleet.options["sites"]
        for record in self._run.rounds()[self._reported_rounds :]:
            self._reported_rounds = int(record["round"]) + 1
            sampled, refused = len(record["sampled"]), record["refused"]
            parts = [
                f"{sampled - len(refused)} of {sampled} sites",
                f"loss {record['loss']:.4f}",
                f"{record['seconds']:.0f} s",
                *(f"without {names[refusal['client']]}: {refusal['why']}" for refusal in refused),
            ]
            rounds = self._federation.experiment.train.rounds
            self._report(f"round {self._reported_rounds} of {rounds}: {', '.join(parts)}")
