"""`fedmllm server`: a SuperLink, the sites' keys, one run submitted and brought to its end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmllm.config import Experiment
from fedmllm.errors import RunError
from fedmllm.experiment import Report
from fedmllm.remote.files import FederationFile
from fedmllm.remote.processes import Process, environment
from fedmllm.store import RunDir
from fedmllm.tensors import write_atomically

APP = Path(__file__).parent / "app"
"""The folder that is submitted: it names the apps of the installed package, and holds no code."""
_CONNECTION = "fedmllm"
_LOOK = 0.3
"""Seconds between two looks at how the run is doing."""


class Server:
    """One federation: `run` is its run directory. Used as a context manager, so that the SuperLink ends with it."""

    def __init__(self, file: FederationFile, experiment: Experiment, run: RunDir, report: Report, ask: float = 20.0) -> None:
        """`ask` is how often, in seconds, the SuperLink is asked whether the run is still under way."""
        self._file, self._experiment, self._run, self._report, self._ask = file, experiment, run, report, ask
        self._state = Path(file.state).resolve()
        self._told = 0
        self._env = environment(self._state / "flower", FLWR_LOG_LEVEL="WARNING")
        self.superlink = Process("the SuperLink", self._command, self._env, self._state / "superlink.log")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.superlink.stop()

    def _command(self) -> list[str]:
        file = self._file
        return [
            sys.executable, "-m", "fedmllm.remote.superlink", "--host", file.host, "--port", str(file.port),
            "--ssl-ca-certfile", file.ca, "--ssl-certfile", file.certificate, "--ssl-keyfile", file.key,
            "--enable-supernode-auth", "--database", str(self._state / "superlink.db"),
        ]  # fmt: skip

    @property
    def _address(self) -> str:
        host = "127.0.0.1" if self._file.host in ("0.0.0.0", "::") else self._file.host
        return f"{host}:{self._file.port}"

    def execute(self) -> dict[str, Any]:
        """Bring the run to its end and return its result. Raises RunError for what its user can mend, RuntimeError where the
        run failed `attempts` times without getting on."""
        if self._run.complete:
            return self._run.result()
        self._prepare()
        failures, reached = 0, self._done()
        while True:
            self._up()
            ended = self._follow(self._submit())
            if self._run.complete:
                return self._run.result()
            if ended.get("ended") == "refused":
                raise RunError(str(ended["why"]))
            failures, reached = (1, self._done()) if self._done() > reached else (failures + 1, reached)
            why = str(ended.get("why", "it ended without a word"))
            if failures >= self._file.attempts:
                raise RuntimeError(f"{why} ({failures} attempts; Flower's log is {self.superlink.log})")
            self._report("begins again", 0, 0, f"{why}; attempt {failures + 1} of {self._file.attempts}")
            time.sleep(min(2**failures, 30))

    def _done(self) -> int:
        return len(self._run.rounds())

    def _prepare(self) -> None:
        home = self._state / "flower"
        connection = {"address": self._address, "root-certificates": self._file.ca}
        lines = [f"{key} = {json.dumps(value)}" for key, value in connection.items()]
        text = "\n".join(["[superlink]", f'default = "{_CONNECTION}"', f"[superlink.{_CONNECTION}]", *lines, ""])
        write_atomically(home / "config.toml", text.encode())
        write_atomically(self._state / "experiment.toml", self._experiment.toml().encode())
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._file.host, self._file.port))
            except OSError as error:
                where = f"{self._file.host}:{self._file.port}"
                raise RunError(f"cannot listen on {where} ({error.strerror}); end what does, or change host or port.") from None

    # The SuperLink

    def _up(self, patience: float = 120.0) -> None:
        """Start the SuperLink unless it runs, and register the sites. Raises RunError where it does not come up."""
        self.superlink.tend()
        end = time.monotonic() + patience
        while True:
            host, _, port = self._address.rpartition(":")
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                break
            told = self.superlink.tend()
            if time.monotonic() > end or (told and self.superlink.starts > 2):
                raise RunError(f"Flower's SuperLink does not come up: {told or self.superlink.log}")
            time.sleep(0.2)
        self._register()

    def _flwr(self, *arguments: str) -> tuple[dict[str, Any], str]:
        """What the `flwr` command prints as JSON, and all that it prints where that is none."""
        command = ["flwr", *arguments, _CONNECTION, "--format", "json"]
        try:
            done = subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return {}, "it did not answer within 120 s"
        start = done.stdout.find("{")
        with contextlib.suppress(ValueError):
            found = json.loads(done.stdout[start:]) if start >= 0 else None
            if isinstance(found, dict):
                return found, " ".join(str(found.get("error-message", "")).split())
        return {}, " ".join((done.stdout + done.stderr).split())

    def _register(self) -> None:
        """The sites' keys, each under the site's name, and no others. Raises RunError for a key that Flower refuses."""
        path = self._state / "registered.json"
        known: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.is_file() else {}
        wanted = {site: hashlib.sha256(Path(key).read_bytes()).hexdigest() for site, key in self._file.sites.items()}
        for site in [site for site, entry in known.items() if wanted.get(site) != entry["key"]]:
            self._flwr("supernode", "unregister", known.pop(site)["node"])
            write_atomically(path, json.dumps(known).encode())
        for site in wanted.keys() - known.keys():
            found, said = self._flwr("supernode", "register", self._file.sites[site], "--name", site)
            if not found.get("success"):
                raise RunError(f"sites.{site}: Flower does not register {self._file.sites[site]} ({said}).")
            known[site] = {"node": str(found["node-id"]), "key": wanted[site]}
            write_atomically(path, json.dumps(known).encode())

    # The run

    def _submit(self) -> tuple[str, Path]:
        """(Flower's number of the run, the file that will say how it ended). Raises RunError."""
        status = self._state / f"status-{time.time_ns()}.json"
        settings = {
            "experiment": str(self._state / "experiment.toml"),
            "out": str(self._run.path.resolve()),
            "status": str(status),
        }
        text = " ".join([*(f"{key}={json.dumps(value)}" for key, value in settings.items()), "resume=true"])
        command = ["flwr", "run", str(APP), _CONNECTION, "-c", text, "--format", "json"]
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=120)
        start = done.stdout.find("{")
        try:
            return str(json.loads(done.stdout[start:])["run-id"]), status
        except (ValueError, KeyError):
            said = " ".join((done.stdout + done.stderr).split())
            raise RunError(f"Flower does not take the run ({said[:500]}).") from None

    def _follow(self, submitted: tuple[str, Path]) -> Mapping[str, Any]:
        """How the run ended: what its status file says, or what else there is to know."""
        number, status = submitted
        asked = time.monotonic()
        while True:
            self._tell()
            if status.is_file():
                ended: dict[str, Any] = json.loads(status.read_text())
                status.unlink()
                return ended
            if words := self.superlink.tend():
                return {"ended": "failed", "why": words}
            if time.monotonic() - asked > self._ask:
                asked = time.monotonic()
                found, _ = self._flwr_run(number)
                if found.startswith("finished") and not status.is_file():
                    return {"ended": "failed", "why": f"Flower says {found}"}
            time.sleep(_LOOK)

    def _flwr_run(self, number: str) -> tuple[str, str]:
        found, said = self._flwr("ls", "--run-id", number)
        runs: Sequence[Mapping[str, Any]] = found.get("runs") or [{}]
        return str(runs[0].get("status", "")), said

    def _tell(self) -> None:
        """Report the rounds that are new."""
        records = self._run.rounds() if self._run.exists else []
        for record in records[self._told :]:
            refused = "".join(f"  {r['client']}: {r['why']}" for r in record["refused"])
            note = f"loss {record['loss']:.3f}{refused}"
            self._report("rounds", record["round"] + 1, self._experiment.train.rounds, note)
        self._told = len(records)


__all__ = ["APP", "Server"]
