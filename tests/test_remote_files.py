"""Site files, federation files, keys, the worker's socket, and what the commands say about what is wrong with them."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
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
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.app import ConfigRecord, Context, Message, RecordDict

from commands import call, run
from federations import wait_for, write_federation
from fedmllm.errors import ConfigError
from fedmllm.remote import clientapp, server
from fedmllm.remote.files import FederationFile, SiteFile
from fedmllm.remote.protocol import Job, Reply, parts_of, to_bytes
from fedmllm.remote.records import HEAD, pack, unpack
from fedmllm.remote.service import KEPT, Answers
from fedmllm.remote.superlink import LocalOnly, is_local
from fedmllm.remote.supernode import harmless, install
from fedmllm.remote.supervisor import Supervisor
from fedmllm.remote.wire import NoAnswer, ask, serve
from fedmllm.storage.lock import locked
from grids import DirectGrid

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    root = tmp_path_factory.mktemp("files")
    write_federation(root, tiny)
    return root


# Keys


def test_keys_are_secret_and_fit_each_other(folder: Path) -> None:
    keys = folder / "keys"
    for name in ("ca.key", "server.key", "north.key"):
        assert stat.S_IMODE((keys / name).stat().st_mode) == 0o600
    authority = x509.load_pem_x509_certificate((keys / "ca.crt").read_bytes())
    certificate = x509.load_pem_x509_certificate((keys / "server.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    private = load_ssh_private_key((keys / "north.key").read_bytes(), None)
    public = load_ssh_public_key((keys / "north.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.public_key() == public
    assert private.curve.name == "secp384r1", "as Flower wants it"


def test_keys_are_made_on_each_machine_for_itself(tmp_path: Path) -> None:
    made = run("keys", tmp_path / "k", "--site", "north")["made"]
    assert [Path(path).name for path in made] == ["north.key", "north.pub"]
    made = run("keys", tmp_path / "k", "--host", "fed.example.org", "--host", "10.0.0.7")["made"]
    assert [Path(path).name for path in made] == ["ca.key", "ca.crt", "server.key", "server.crt"]
    names = x509.load_pem_x509_certificate((tmp_path / "k" / "server.crt").read_bytes())
    found = names.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert [str(a) for a in found.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "127.0.0.1"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "nothing to create: give --host"),
        (["--site", "../north"], "a site's name is letters"),
        (["--site", "north", "--site", "north"], "north.key is there already"),
    ],
)
def test_keys_are_not_made_over_others(tmp_path: Path, arguments: list[str], why: str) -> None:
    done = call("keys", tmp_path, *arguments)
    assert done.exit_code == 2
    assert why in done.stderr


# Files


def spoil(folder: Path, file: str, old: str, new: str) -> Path:
    path = folder / file
    spoilt = path.with_name(f"spoilt-{path.name}")
    text = path.read_text()
    assert old in text
    spoilt.write_text(text.replace(old, new))
    return spoilt


def test_a_site_says_what_it_holds_and_nothing_else(folder: Path) -> None:
    found = run("client", folder / "east" / "site.toml", "--check")
    assert found.pop("superlink").startswith("127.0.0.1:")
    assert found == {"name": "east", "samples": 16, "image": 16, "text": 16, "skipped": 0}
    found = run("client", folder / "south" / "site.toml", "--check")
    assert (found["samples"], found["image"], found["text"]) == (12, 0, 12), "its modalities are a limit"


def test_a_site_may_give_a_whole_task_with_paths_of_its_own(folder: Path) -> None:
    task = 'device = "cpu"\n[task]\nname = "jsonl"\ntrain = "train.jsonl"\ntest = "train.jsonl"\ntrain_samples = 5\n'
    path = spoil(folder, "north/site.toml", 'jsonl = "train.jsonl"\n', "")
    path.write_text(path.read_text().replace('device = "cpu"\n', task))
    assert SiteFile(path).own.task.options["train"] == str(folder / "north" / "train.jsonl")
    assert run("client", path, "--check")["samples"] == 5


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('name = "north"', 'name = "no/rth"', "name: string should match"),
        ('name = "north"\n', "", "name: this key is required"),
        ('key = "../keys/north.key"', 'key = "north.key"', "key = 'north.key': there is no such file"),
        ('ca = "../keys/ca.crt"', 'ca = "ca.crt"', "ca = 'ca.crt': there is no such file"),
        ('modalities = ["image"]', 'modalities = ["sound"]', "modalities.0: input should be 'image' or 'text'"),
        ('modalities = ["image"]', "modalities = []", "modalities"),
        ('jsonl = "train.jsonl"', 'jsonl = "none.jsonl"', "none.jsonl is missing"),
        ('jsonl = "train.jsonl"', "", "give either a [task] table or jsonl"),
        ('device = "cpu"', 'divice = "cpu"', "divice: unknown key; did you mean 'device'?"),
        ('superlink = "127.0.0.1', 'superlink = "127.0.0.1" #', "superlink: string should match"),
    ],
)
def test_what_is_wrong_with_a_site_file_is_one_sentence(folder: Path, old: str, new: str, why: str) -> None:
    done = call("client", spoil(folder, "north/site.toml", old, new), "--check")
    assert done.exit_code == 2, done.output
    assert why in done.stderr
    assert "Traceback" not in done.stderr


def test_a_site_without_anything_that_it_may_use_is_one_sentence(folder: Path) -> None:
    file = folder / "north" / "blind.toml"
    file.write_text((folder / "north" / "site.toml").read_text().replace("train.jsonl", "texts.jsonl"))
    line = {"id": "a", "text": "a red thing", "question": "which color?", "choices": ["red", "blue"], "answer": "red"}
    (folder / "north" / "texts.jsonl").write_text(json.dumps(line) + "\n")
    done = call("client", file, "--check")
    assert done.exit_code == 2
    assert "none of the 1 samples has image, so there is nothing to train on" in done.stderr


def test_a_site_is_at_work_once(folder: Path) -> None:
    site = SiteFile(folder / "north" / "site.toml")
    with locked(site.state / "lock", RuntimeError()):
        done = call("client", site.path)
    assert done.exit_code == 2
    assert "another `fedmllm client` is at work" in done.stderr


def test_a_port_that_is_taken_is_one_sentence(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", FederationFile(folder / "server" / "federation.toml", []).port))
        taken.listen()
        done = call("server", folder / "server" / "federation.toml", "--out", folder / "never")
    assert done.exit_code == 2
    assert "cannot listen on 127.0.0.1:" in done.stderr
    assert not (folder / "never").exists()


def test_a_key_that_others_may_read_is_refused(folder: Path) -> None:
    key = folder / "keys" / "east.key"
    key.chmod(0o640)
    try:
        done = call("client", folder / "east" / "site.toml", "--check")
    finally:
        key.chmod(0o600)
    assert done.exit_code == 2
    assert "chmod 600" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('experiment = "experiment.toml"', 'experiment = "none.toml"', "there is no such experiment file"),
        ('north = "../keys/north.pub"', 'north = "../keys/north.key"', "sites.north = '../keys/north.key' is no public key"),
        ('north = "../keys/north.pub"', 'north = "n.pub"', "sites.north = 'n.pub': there is no such file"),
        ('address = "127.0.0.1', 'address = "127.0.0.1" #', "address: string should match"),
        ('certificate = "../keys/server.crt"\n', "", "certificate: this key is required"),
        ("[sites]", "sitse = 3\n[sites]", "sitse: unknown key; did you mean 'sites'?"),
    ],
)
def test_what_is_wrong_with_a_federation_file_is_one_sentence(folder: Path, old: str, new: str, why: str) -> None:
    done = call("server", spoil(folder, "server/federation.toml", old, new), "--out", folder / "none")
    assert done.exit_code == 2, done.output
    assert why in done.stderr
    assert not (folder / "none").exists()


def test_the_clients_are_the_sites_in_the_order_of_the_file(folder: Path) -> None:
    config = FederationFile(folder / "server" / "federation.toml", ["train.rounds=7"]).experiment
    assert config.fleet.options["sites"] == ["north", "south", "east"]
    assert (config.partition.clients, config.train.rounds, config.train.clients_per_round) == (3, 7, 3)
    with pytest.raises(ConfigError, match=r"fleet\.sites is \['north'\]"):
        FederationFile(folder / "server" / "federation.toml", ['fleet.sites=["north"]'])


def test_an_experiment_over_flower_is_not_run_in_this_process(folder: Path) -> None:
    done = call("run", folder / "server" / "experiment.toml", "--set", 'fleet.sites=["a", "b"]', "--out", folder / "none")
    assert done.exit_code == 2


def test_a_missing_extra_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmllm.cli.remote.find_spec", lambda name: None)
    for command in (["client", folder / "east" / "site.toml"], ["server", folder / "server" / "federation.toml"]):
        done = call(*command)
        assert done.exit_code == 2
        assert done.stderr.strip() == 'error: flwr is not installed; `pip install "fedmllm[flower]"` brings it.'


def test_the_example_app_is_the_shipped_one_and_sends_nothing_else() -> None:
    shipped, example = server.APP, ROOT / "examples" / "flower"
    assert [path.name for path in example.iterdir()] == ["pyproject.toml"], "Flower would send the rest to all sites"
    assert (shipped / "pyproject.toml").read_text() == (example / "pyproject.toml").read_text()


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


def test_the_socket_is_its_owners_alone(echoing: Path) -> None:
    assert stat.S_IMODE(echoing.stat().st_mode) == 0o600
    big = os.urandom(3_000_000)
    assert ask(echoing, big, 5) == big[::-1]
    assert ask(echoing, b"", 5) == b""


def test_an_empty_message_is_answered_at_the_first_asking(echoing: Path) -> None:
    for _ in range(500):  # one in forty found the connection closed, while nothing was still sent after the length
        assert ask(echoing, b"", patience=0) == b""


def test_a_worker_that_is_not_there_is_waited_for_and_no_longer(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(NoAnswer, match="the site's worker does not answer"):
        ask(tmp_path / "none", b"x", 1.0, pause=0.1)
    assert 1.0 <= time.monotonic() - began < 5


def test_a_worker_that_goes_away_in_the_middle_is_asked_again(tmp_path: Path) -> None:
    path, first, stop = tmp_path / "s", [True], threading.Event()

    def answer(content: bytes) -> bytes:
        if first.pop() if first else False:
            raise OSError("as if it had been killed")
        return b"an answer"

    thread = threading.Thread(target=serve, args=(path, answer, stop.is_set))
    thread.start()
    try:
        assert ask(path, b"x", 10, pause=0.1) == b"an answer"
    finally:
        stop.set()
        thread.join()


def test_the_app_hands_messages_to_the_worker_and_reports_one_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stop, seen = tmp_path / "s", threading.Event(), []

    def answer(content: bytes) -> bytes:
        seen.append(Job.of(*parts_of(content)))
        return to_bytes(Reply(4, examples=9, steps=2))

    thread = threading.Thread(target=serve, args=(path, answer, stop.is_set))
    thread.start()
    wires = DirectGrid(clientapp.app, {1: {"worker": str(path)}})
    message = Message(unpack(to_bytes(Job("train", "ab" * 8, "text", 4))), 1, "train")
    wires.push_messages([message])
    (reply,) = wires.pull_messages([message.metadata.message_id])
    assert (seen[0].client, seen[0].config) == (4, "text")
    assert Reply.of(*parts_of(pack(reply.content))).examples == 9
    stop.set()
    thread.join()
    monkeypatch.setattr(clientapp, "PATIENCE", 0.1)
    gone = clientapp.answer(message, Context(0, 1, {"worker": str(path)}, RecordDict(), {}))
    assert "the site's worker does not answer" in Reply.of(*parts_of(pack(gone.content))).problem


def test_the_app_answers_nonsense_with_a_sentence() -> None:
    wires = DirectGrid(clientapp.app, {1: {}})
    for content, why in (
        (RecordDict({"x": ConfigRecord({"y": 1})}), "cannot be read"),
        (RecordDict({HEAD: ConfigRecord({"head": Job("train", "ab" * 8, "").head()})}), "neither `worker` nor `partition-id`"),
    ):
        message = Message(content, 1, "train")
        wires.push_messages([message])
        (reply,) = wires.pull_messages([message.metadata.message_id])
        assert why in Reply.of(*parts_of(pack(reply.content))).problem


def test_a_job_that_comes_again_is_given_the_same_reply() -> None:
    class Counting:
        def __init__(self) -> None:
            self.jobs: list[Job] = []

        def answer(self, jobs: Any) -> list[Reply]:
            self.jobs += jobs
            return [Reply(jobs[0].client, steps=len(self.jobs), problem="out of disk" if jobs[0].round == 9 else "")]

    worker = Counting()
    answers = Answers(worker)  # type: ignore[arg-type]

    def asked(round: int, kind: Any = "train") -> int:
        return Reply.of(*parts_of(answers(to_bytes(Job(kind, "ab" * 8, "", 1, round))))).steps

    assert [asked(0), asked(0), asked(1), asked(0)] == [1, 1, 2, 1]
    assert [asked(9), asked(9)] == [3, 4], "a problem may have passed"
    assert [asked(0, "describe"), asked(0, "describe")] == [5, 6]
    for number in range(20, 20 + KEPT):
        asked(number)
    assert asked(0) == 7 + KEPT, "not for ever"
    assert "not a message" in Reply.of(*parts_of(answers(b"nonsense"))).problem


# Processes


def test_a_process_is_started_again_ever_later_and_ended_with_what_it_started(tmp_path: Path) -> None:
    said: list[str] = []
    keeper = Supervisor("one", lambda: ["false"], os.environ, said.append)
    end = time.monotonic() + 4
    while time.monotonic() < end:
        keeper.look()
        time.sleep(0.02)
    assert said[:2] == [
        "one ended with status 1; it is started again in 2 s",
        "one ended with status 1; it is started again in 4 s",
    ]
    keeper.end()
    note = tmp_path / "pids"
    script = f"sleep 100 & echo $! > {note}; wait"
    other = Supervisor("other", lambda: ["sh", "-c", script], os.environ, said.append)
    other.look()
    child = int(wait_for(lambda: note.read_text() if note.exists() else "", 10))
    other.end()
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text(), 10)


# The SuperLink's door


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.7", False),
     ("::ffff:10.0.0.7", False), ("fe80::1", False), ("", False), ("localhost", False)],
)  # fmt: skip
def test_what_is_this_machine(host: str, local: bool) -> None:
    assert is_local(host) is local


def status_of(path: str, host: str) -> int:
    """What a stranger is answered; 200 where the SuperLink itself answers."""
    statuses: list[int] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "path": path, "client": (host, 5), "method": "POST", "headers": []}
    asyncio.run(LocalOnly(inner)(scope, receive, send))
    return statuses[0]


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/runtime/get-nodes", "/docs", "/", "/v1/fleetx", "/v1/fleet/../control/start-run/"]
)
def test_strangers_reach_the_fleet_api_only(path: str) -> None:
    assert status_of("/v1/fleet/pull-messages", "10.0.0.7") == 200
    assert status_of(path, "127.0.0.1") == 200
    assert status_of(path, "10.0.0.7") == 403


def archive(**files: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        for name, text in files.items():
            packed.writestr(name.replace("__", "/").replace("_DOT_", "."), text)
    return content.getvalue()


SHIPPED = (server.APP / "pyproject.toml").read_text()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_site_runs_the_shipped_app_as_flower_packs_it() -> None:
    from flwr.cli.build import build_fab_from_disk

    assert harmless(build_fab_from_disk(ROOT / "examples" / "flower"))
    assert harmless(archive(pyproject_DOT_toml=SHIPPED))


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
def test_a_site_runs_no_other_app(content: bytes) -> None:
    assert not harmless(content)


def test_the_check_is_where_flower_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Flower's own function: an app of others is answered by an error, and nothing of it is kept."""
    from flwr.app import Error
    from flwr.common.constant import ErrorCode
    from flwr.supercore.fab import Fab
    from flwr.supernode import start_client_internal as flower

    for name in ("_pull_and_store_message", "_verify_fab"):
        monkeypatch.setattr(flower, name, getattr(flower, name))
    replies: list[Message] = []
    monkeypatch.setattr(flower, "_insert_message", lambda message, *_: replies.append(message))
    install()
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


def test_the_app_that_flower_starts_for_each_message_loads_no_torch() -> None:
    code = "import sys, fedmllm.remote.clientapp; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) is False
