"""A site's processes end within five seconds, whatever they are doing and whichever of them is told to."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from federations import wait_for
from fedmllm.remote import client, service, supervisor
from fedmllm.remote.files import SiteFile
from fedmllm.remote.protocol import Job, to_bytes
from fedmllm.remote.wire import send

SECONDS = 5.0
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """The id of a copy of this process that does `work` and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored where the tests run under nohup
            work()
        finally:
            os._exit(70)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def status_of(pid: int) -> int:
    """The exit status of a child, as `subprocess` gives it; the child must end in time."""
    _, status = wait_for(lambda: (ended := os.waitpid(pid, os.WNOHANG))[0] and ended, SECONDS)
    return os.waitstatus_to_exitcode(status)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The worker


def train() -> NoReturn:
    """A job whose library ignores every exception."""
    while True:
        with suppress(BaseException):
            time.sleep(0.01)


def wait_for_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.accept()


TASKS = [
    train,
    wait_for_network,
    lambda: re.match(r"(a+)+$", "a" * 64 + "b"),  # holds the interpreter's lock, so that no handler of Python's can run
    lambda: re.match(r"(.*,){40}x", "1," * 60),
    lambda: torch.linalg.eigvals(torch.rand(3000, 3000)),
    lambda: time.sleep(600),
]


@pytest.mark.parametrize("task", TASKS, ids=["train", "network", "regex", "regex-2", "kernel", "sleep"])
def test_a_worker_ends_whatever_it_does(task: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class BusyWorker:
        def __init__(self, *_: object) -> None: ...

        def answer(self, jobs: list[Job]) -> None:
            (tmp_path / "busy").touch()
            task()

    monkeypatch.setattr(service, "Worker", BusyWorker)
    path = tmp_path / "worker"
    site = write_site(tmp_path)
    with forked(lambda: service.main(site, path)) as pid, socket.socket(socket.AF_UNIX) as connection:
        wait_for(path.exists, 10)
        wait_for(lambda: connection.connect_ex(os.fspath(path)) == 0, 10)
        send(connection, to_bytes(Job("train", "ab" * 8, "")))
        wait_for((tmp_path / "busy").exists, 10)
        os.kill(pid, signal.SIGTERM)
        assert status_of(pid) == -signal.SIGTERM


# The command that supervises it

STUCK = """#!{python} -SE
import os, re, signal
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
{before}
open("{folder}/" + str(os.getpid()) + ".pid", "w").close()
re.match("(a+)+$", "a" * 64 + "b")
"""


def write_site(folder: Path) -> Path:
    """A site file whose data are never read."""
    (folder / "ca.crt").touch()
    (folder / "north.key").touch(mode=0o600)
    file = folder / "site.toml"
    file.write_text('name = "north"\nsuperlink = "127.0.0.1:9"\nca = "ca.crt"\nkey = "north.key"\njsonl = "train.jsonl"\n')
    return file


@contextmanager
def stuck_site(folder: Path, monkeypatch: pytest.MonkeyPatch, before: str = "") -> Iterator[tuple[int, list[int]]]:
    """The id of a process as `fedmllm client` runs it, and those of its two processes, which are stuck, and theirs."""
    script = folder / "stuck"
    script.write_text(STUCK.format(python=sys.executable, folder=folder, before=before))
    script.chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(supervisor, "PATIENCE", 0.3)
    expected = 4 if before else 2
    reports: list[str] = []
    site = SiteFile(write_site(folder))
    with forked(lambda: client.serve(site, reports.append)) as pid:
        pids: list[int] = []
        try:
            wait_for(lambda: len(list(folder.glob("*.pid"))) == expected, 20)
            pids += [int(path.stem) for path in folder.glob("*.pid")]
            yield pid, pids
        finally:
            for stuck in filter(is_running, pids):
                os.kill(stuck, signal.SIGKILL)


def test_a_stopped_client_ends_stuck_processes_and_what_they_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert supervisor.PATIENCE < SECONDS
    with stuck_site(tmp_path, monkeypatch, before="os.fork()") as (pid, pids):
        os.kill(pid, signal.SIGTERM)
        assert status_of(pid) == 70, "it returned"
        assert not any(map(is_running, pids))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_killed_client_leaves_no_process(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stuck_site(tmp_path, monkeypatch) as (pid, pids):
        os.kill(pid, number)
        assert status_of(pid) == -number
        wait_for(lambda: not any(map(is_running, pids)), SECONDS)


def test_a_process_whose_parent_is_gone_already_does_not_begin() -> None:
    with forked(lambda: supervisor._die_with(os.getpid())) as pid:
        assert status_of(pid) == 1


def test_all_processes_share_one_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PATIENCE", 1.0)

    def command(name: str) -> list[str]:
        return ["sh", "-c", f"trap '' TERM; : > {tmp_path / name}; while :; do sleep 0.05; done"]

    processes = [supervisor.Supervisor(name, partial(command, name), os.environ, print) for name in "abcd"]
    for process in processes:
        process.check()
    wait_for(lambda: len(list(tmp_path.iterdir())) == len(processes), 20)
    began = time.monotonic()
    supervisor.stop(*processes)
    assert 1.0 <= time.monotonic() - began < 4.0, "not one after the other"
    assert all(process.process is None for process in processes)
