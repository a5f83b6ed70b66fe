"""Processes beside ours: started in a group of their own, ended with it, started again with back-off when they end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fedmllm.errors import RunError

_LOG_LIMIT = 10 << 20
"""Bytes of a log that are kept from one start to the next."""


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of Flower's processes: they find each other's programs, keep to `home`, install nothing and tell nobody
    anything."""
    told = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
    }
    return {**os.environ, **told, **more}


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent(every: float = 1.0) -> None:
    """End this process when the one that started it is gone, however that ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises RunError where another process does: two must never share it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{folder}: another process uses it; wait for its end, or end it.") from None
        yield


class Process:
    """A command that is kept running. `command` is asked for anew at each start. Its output goes to `log`, or to ours.

    After an end it is started again when a back-off is over: 1 s, doubled with every end up to `slowest`, and 1 s again once
    it ran for longer than that.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        env: Mapping[str, str],
        log: Path | None = None,
        slowest: float = 60.0,
    ) -> None:
        self.name, self.log = name, log
        self._command, self._env, self._slowest = command, env, slowest
        self._process: subprocess.Popen[bytes] | None = None
        self._began = self._again = 0.0
        self._pause = 1.0
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """None where it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def tend(self) -> str:
        """Start it if it does not run and its time has come; what there is to tell of it, mostly nothing."""
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return ""
            self.stop()  # what it left behind
            self._pause = 1.0 if time.monotonic() - self._began > self._slowest else min(2 * self._pause, self._slowest)
            self._again = time.monotonic() + self._pause
            return f"{self.name} ended with status {status}; it starts again in {self._pause:g} s{self._last_words()}"
        if time.monotonic() >= self._again:
            self._start()
        return ""

    def _start(self) -> None:
        command = list(self._command())
        self._began, self.starts = time.monotonic(), self.starts + 1
        if self.log is None:
            self._process = subprocess.Popen(command, env=self._env, start_new_session=True)
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        mode = "wb" if self.log.exists() and self.log.stat().st_size > _LOG_LIMIT else "ab"
        with self.log.open(mode) as log:
            self._process = subprocess.Popen(command, env=self._env, start_new_session=True, stdout=log, stderr=log)

    def _last_words(self) -> str:
        if self.log is None or not self.log.exists():
            return ""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f" ({self.log}: {lines[-1][:200]})" if lines else f" ({self.log})"

    def stop(self, patience: float = 10.0) -> None:
        """End it and all of its group, gently for `patience` seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def on_sigterm() -> None:
    """SIGTERM, which service managers send, ends us as Ctrl-C does: with everything that we started."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


__all__ = ["Process", "alone_in", "die_with_parent", "environment", "free_port", "on_sigterm"]
