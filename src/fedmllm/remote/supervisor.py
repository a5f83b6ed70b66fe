"""Processes that are kept alive: started again when they end, ever later, and all ended together."""

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
from pathlib import Path

from fedmllm.errors import ConfigError

LONGEST = 30.0
"""Seconds between two starts at most."""
LIVED = 60.0
"""A process that lived so many seconds was well, and is started again at once."""
LONGEST_LOG = 10 << 20
"""Bytes of a log beyond which the next start of its process begins it anew."""
_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
"""Looked up here: after a fork the lock of the loader may be another thread's for ever."""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tool(name: str) -> str:
    """The path of a command that came with Flower. Raises ConfigError where there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ConfigError(f'the command {name} is missing; install Flower with `pip install "fedmllm[flower]"`.')
    return found


def environment(home: Path) -> dict[str, str]:
    """For Flower's processes: nothing is sent home, nothing is installed at run time, files go to `home`."""
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


def _die_with_parent() -> None:
    """In the child: end when the parent does, even where the parent was killed (Linux only)."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Supervisor:
    """One process. `command` is asked anew for each start, so that ports may change. What it says goes to `log`, where there is
    one. Start it from the main thread: the kernel takes the thread for the parent."""

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        env: Mapping[str, str],
        say: Callable[[str], None],
        log: Path | None = None,
    ) -> None:
        self.name, self._command, self._env, self._say, self._log = name, command, env, say, log
        self.process: subprocess.Popen[bytes] | None = None
        self._started = self._due = 0.0
        self._pause = 1.0

    def look(self) -> None:
        """Start the process if it is not there and it is time."""
        now = time.monotonic()
        if self.process is not None and (status := self.process.poll()) is not None:
            _end_group(self.process.pid)  # what it left behind
            self.process = None
            self._pause = 1.0 if now - self._started > LIVED else min(2 * self._pause, LONGEST)
            self._due = now + self._pause
            words = f" (its log is {self._log})" if self._log else ""
            self._say(f"{self.name} ended with status {status}; it is started again in {self._pause:g} s{words}")
        if self.process is None and now >= self._due:
            self._started = now
            with self._output() as output:
                self.process = subprocess.Popen(
                    list(self._command()), env=dict(self._env), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    start_new_session=True, preexec_fn=_die_with_parent,
                )  # fmt: skip

    @contextmanager
    def _output(self) -> Iterator[int]:
        if self._log is None:
            yield sys.stderr.fileno()
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        begin_anew = self._log.is_file() and self._log.stat().st_size > LONGEST_LOG
        with self._log.open("wb" if begin_anew else "ab") as file:
            yield file.fileno()

    def end(self, patience: float = 10.0) -> None:
        """End it and all that it started, in good time or by force."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        _end_group(self.process.pid)
        self.process.wait()
        self.process = None


def _end_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


class Stop:
    """Whether this process was asked to end, by SIGTERM or Ctrl-C."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def __call__(self) -> bool:
        return self.asked


__all__ = ["Stop", "Supervisor", "environment", "free_port", "tool"]
