"""Processes that are kept alive: restarted with increasing pauses when they end, and ended together with what they started."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from fedmllm.errors import ConfigError

MAX_PAUSE = 30.0
"""The longest pause between two starts, in seconds."""
HEALTHY = 60.0
"""A process that ran for this many seconds was healthy, so the pauses begin again with the shortest."""
PATIENCE = 4.0
"""Seconds between SIGTERM and SIGKILL. The kernel needs little more, so that all processes have ended after five."""
MAX_LOG = 10 << 20
"""Bytes of a log beyond which it is overwritten at the next start of its process."""
_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
"""Looked up at import: after a fork, another thread may hold the lock of the dynamic loader forever."""


def free_port() -> int:
    """A port of the loopback interface on which nothing listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tool(name: str) -> str:
    """The path of a command that is installed with Flower. Raises ConfigError if it is missing."""
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.is_file() else shutil.which(name)
    if path is None:
        raise ConfigError(f'the command {name} is missing; install Flower with `pip install "fedmllm[flower]"`.')
    return path


def environment(home: Path) -> dict[str, str]:
    """The environment of Flower's processes: this process's own, plus settings that disable telemetry, update checks and
    installations at run time and that keep files in `home`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {
        "PATH": path,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": os.environ.get("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.2"),
    }


def _die_with(parent: int) -> None:
    """In the child: be killed when the parent ends, even if the parent is killed (Linux only)."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a process that is busy or stuck would not act on SIGTERM
        if os.getppid() != parent:  # the parent ended before this request
            os._exit(1)


class Supervisor:
    """Keeps one process alive.

    `command` is called before each start, so that ports may change. The process's output goes to the file `log`, or to standard
    error. Processes must be started from the main thread: the kernel treats the starting thread as the parent.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        env: Mapping[str, str],
        report: Callable[[str], None],
        log: Path | None = None,
    ) -> None:
        self.name, self._command, self._env, self._report, self._log = name, command, env, report, log
        self.process: subprocess.Popen[bytes] | None = None
        self.restarts = 0
        self._started = self._due = 0.0
        self._pause = 1.0

    def check(self) -> None:
        """Start the process if it is not running and its pause is over."""
        now = time.monotonic()
        if self.process is not None and (status := self.process.poll()) is not None:
            _kill_group(self.process.pid)  # end what it left behind
            self.process = None
            self.restarts += 1
            self._pause = 1.0 if now - self._started > HEALTHY else min(2 * self._pause, MAX_PAUSE)
            self._due = now + self._pause
            log = f" (its log is {self._log})" if self._log else ""
            self._report(f"{self.name} ended with status {status}; it is restarted in {self._pause:g} s{log}")
        if self.process is None and now >= self._due:
            self._started = now
            with self._output() as output:
                self.process = subprocess.Popen(
                    list(self._command()), env=dict(self._env), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    start_new_session=True, preexec_fn=partial(_die_with, os.getpid()),
                )  # fmt: skip

    @contextmanager
    def _output(self) -> Iterator[int]:
        if self._log is None:
            yield sys.stderr.fileno()
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        overwrite = self._log.is_file() and self._log.stat().st_size > MAX_LOG
        with self._log.open("wb" if overwrite else "ab") as file:
            yield file.fileno()


def stop(*supervisors: Supervisor) -> None:
    """End the processes and everything that they started: with SIGTERM, and with SIGKILL after `PATIENCE` seconds."""
    processes = [supervisor.process for supervisor in supervisors if supervisor.process is not None]
    for process in processes:
        process.terminate()
    end = time.monotonic() + PATIENCE
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(end - time.monotonic(), 0))
        _kill_group(process.pid)
        process.wait()
    for supervisor in supervisors:
        supervisor.process = None


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def stop_signal() -> Callable[[], bool]:
    """A function that says whether this process has received SIGTERM or SIGINT since this call."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    return lambda: bool(received)
