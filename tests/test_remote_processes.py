"""What runs at a site: the worker's socket, supervised processes, and the restricted SuperLink and SuperNode."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from federations import wait_for
from fedmllm.remote import clientapp, server
from fedmllm.remote.protocol import Job, Reply, parts_of, to_bytes
from fedmllm.remote.records import HEADER, pack, unpack
from fedmllm.remote.service import CAPACITY, ReplyCache
from fedmllm.remote.supernode import install_check, is_shipped_app
from fedmllm.remote.supervisor import Supervisor, environment, stop
from fedmllm.remote.wire import NoAnswer, request, serve
from grids import DirectGrid

ROOT = Path(__file__).parents[1]


# The socket


@pytest.fixture
def echoing(tmp_path: Path) -> Iterator[Path]:
    path, stop = Path(os.path.relpath(tmp_path / "s")), threading.Event()
    thread = threading.Thread(target=serve, args=(path, lambda content: content[::-1], stop.is_set))
    thread.start()
    wait_for(path.exists, 10)
    yield path
    stop.set()
    thread.join()
    assert not path.exists()


def test_only_its_owner_may_open_the_socket(echoing: Path) -> None:
    assert stat.S_IMODE(echoing.stat().st_mode) == 0o600
    big = os.urandom(3_000_000)
    assert request(echoing, big, 5) == big[::-1]
    assert request(echoing, b"", 5) == b""


def test_an_empty_message_is_answered_at_the_first_attempt(echoing: Path) -> None:
    for _ in range(500):  # one in forty failed when `send` still sent empty content after the length
        assert request(echoing, b"", patience=0) == b""


def test_a_missing_worker_is_awaited_for_a_limited_time(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(NoAnswer, match="the site's worker does not answer"):
        request(tmp_path / "none", b"x", 0.5, pause=0.1)
    assert 0.5 <= time.monotonic() - began < 5


def test_a_request_is_repeated_if_the_worker_goes_away(tmp_path: Path) -> None:
    path, requests, stop = tmp_path / "s", list[bytes](), threading.Event()

    def answer(content: bytes) -> bytes:
        requests.append(content)
        if len(requests) == 1:
            raise OSError("as if the worker had been killed")
        return b"an answer"

    thread = threading.Thread(target=serve, args=(path, answer, stop.is_set))
    thread.start()
    try:
        assert request(path, b"x", 10, pause=0.1) == b"an answer"
    finally:
        stop.set()
        thread.join()


def test_the_app_passes_messages_to_the_worker_and_reports_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stop, jobs = tmp_path / "s", threading.Event(), list[Job]()

    def answer(content: bytes) -> bytes:
        jobs.append(Job.of(*parts_of(content)))
        return to_bytes(Reply(4, examples=9, steps=2))

    thread = threading.Thread(target=serve, args=(path, answer, stop.is_set))
    thread.start()
    grid = DirectGrid(clientapp.app, {1: {"worker": str(path)}})
    message = Message(unpack(to_bytes(Job("train", "ab" * 8, "text", 4))), 1, "train")
    grid.push_messages([message])
    (reply,) = grid.pull_messages([message.metadata.message_id])
    assert (jobs[0].client, jobs[0].config) == (4, "text")
    assert Reply.of(*parts_of(pack(reply.content))).examples == 9
    stop.set()
    thread.join()
    monkeypatch.setattr(clientapp, "PATIENCE", 0.1)
    unanswered = clientapp.answer(message, Context(0, 1, {"worker": str(path)}, RecordDict(), {}))
    assert "the site's worker does not answer" in Reply.of(*parts_of(pack(unanswered.content))).problem


def test_the_app_answers_a_malformed_message_with_a_sentence() -> None:
    grid = DirectGrid(clientapp.app, {1: {}})
    for content, reason in (
        (RecordDict({"x": ConfigRecord({"y": 1})}), "cannot be read"),
        (
            RecordDict({HEADER: ConfigRecord({"head": Job("train", "ab" * 8, "").header()})}),
            "neither `worker` nor `partition-id`",
        ),
    ):
        message = Message(content, 1, "train")
        grid.push_messages([message])
        (reply,) = grid.pull_messages([message.metadata.message_id])
        assert reason in Reply.of(*parts_of(pack(reply.content))).problem


def test_a_repeated_job_gets_the_same_reply() -> None:
    class CountingWorker:
        def __init__(self) -> None:
            self.jobs: list[Job] = []

        def answer(self, jobs: Any) -> list[Reply]:
            self.jobs += jobs
            return [Reply(jobs[0].client, steps=len(self.jobs), problem="out of disk" if jobs[0].round == 9 else "")]

    replies = ReplyCache(CountingWorker())  # type: ignore[arg-type]

    def steps(round: int, kind: Any = "train") -> int:
        return Reply.of(*parts_of(replies(to_bytes(Job(kind, "ab" * 8, "", 1, round))))).steps

    assert [steps(0), steps(0), steps(1), steps(0)] == [1, 1, 2, 1]
    assert [steps(9), steps(9)] == [3, 4], "the cause of a problem may be gone"
    assert [steps(0, "describe"), steps(0, "describe")] == [5, 6]
    for number in range(20, 20 + CAPACITY):
        steps(number)
    assert steps(0) == 7 + CAPACITY, "the cache is limited"
    assert "not a message" in Reply.of(*parts_of(replies(b"nonsense"))).problem


# Processes


def test_a_process_is_restarted_with_increasing_pauses() -> None:
    messages: list[str] = []
    supervisor = Supervisor("one", lambda: ["false"], os.environ, messages.append)

    def restarted_twice() -> bool:
        supervisor.check()
        return len(messages) == 2

    wait_for(restarted_twice, 20)
    assert messages == ["one ended with status 1; it is restarted in 2 s", "one ended with status 1; it is restarted in 4 s"]
    assert supervisor.restarts == 2
    stop(supervisor)


def test_a_process_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    script = f"sleep 100 & echo $! > {file}; wait"
    supervisor = Supervisor("other", lambda: ["sh", "-c", script], os.environ, lambda message: None)
    supervisor.check()
    child = int(wait_for(lambda: file.read_text() if file.exists() else "", 10))
    stop(supervisor)
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text(), 10)


def test_processes_inherit_the_plugin_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMLLM_PLUGINS", "plugin.py")
    assert environment(tmp_path)["FEDMLLM_PLUGINS"] == "plugin.py"


# The restricted SuperNode


def archive(**files: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        for name, text in files.items():
            packed.writestr(name.replace("__", "/").replace("_DOT_", "."), text)
    return content.getvalue()


SHIPPED = (server.APP / "pyproject.toml").read_text()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_site_accepts_the_shipped_app_as_flower_packs_it() -> None:
    from flwr.cli.build import build_fab_from_disk

    assert is_shipped_app(build_fab_from_disk(ROOT / "examples" / "flower"))
    assert is_shipped_app(archive(pyproject_DOT_toml=SHIPPED))


@pytest.mark.parametrize(
    "content",
    [
        b"no archive",
        archive(),
        archive(pyproject_DOT_toml=SHIPPED, fedmllm_DOT_py="import os"),
        archive(pyproject_DOT_toml=SHIPPED, fedmllm____init__DOT_py="x"),
        archive(pyproject_DOT_toml=SHIPPED, readme_DOT_md="# hello"),
        archive(pyproject_DOT_toml=SHIPPED.replace("fedmllm.remote.clientapp:app", "os:system")),
        archive(pyproject_DOT_toml=SHIPPED.replace("[tool.flwr.app.config]", 'agentapp = "x:y"\n[tool.flwr.app.config]')),
        archive(pyproject_DOT_toml="not = [toml"),
        archive(pyproject_DOT_toml=SHIPPED + "#" * (1 << 21)),
    ],
)
def test_a_site_accepts_no_other_app(content: bytes) -> None:
    assert not is_shipped_app(content)


def test_flower_calls_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own function answers another app with an error, and stores nothing of it."""
    from flwr.app import Error
    from flwr.common.constant import ErrorCode
    from flwr.supercore.fab import Fab
    from flwr.supernode import start_client_internal as flower

    for name in ("_pull_and_store_message", "_verify_fab"):
        monkeypatch.setattr(flower, name, getattr(flower, name))
    replies: list[Message] = []
    monkeypatch.setattr(flower, "_insert_message", lambda message, *_: replies.append(message))
    install_check()
    DirectGrid(clientapp.app, {1: {}})
    message = Message(RecordDict(), 1, "train")
    state = MagicMock()
    state.get_run.return_value = None
    run_id = flower._pull_and_store_message(
        state=state, object_store=MagicMock(), node_config={}, receive=lambda: (message, MagicMock()), get_run=MagicMock(),
        get_fab=lambda *_: Fab("0" * 64, archive(pyproject_DOT_toml=SHIPPED, evil_DOT_py=""), {}), pull_object=MagicMock(),
        confirm_message_received=MagicMock(), trusted_entities=None,
    )  # fmt: skip
    assert run_id == message.metadata.run_id
    assert [reply.error for reply in replies] == [Error(ErrorCode.INVALID_FAB, "The FAB could not be verified.")]
    state.store_fab.assert_not_called()
    state.create_task.assert_not_called()


def test_the_app_that_flower_starts_for_each_message_does_not_load_torch() -> None:
    code = "import sys, fedmllm.remote.clientapp; print(json.dumps('torch' in sys.modules))"
    completed = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert json.loads(completed.stdout.splitlines()[-1]) is False
