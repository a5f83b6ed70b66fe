"""A SuperLink and sites as processes of their own, over TLS on the loopback interface: what they end with, and what ends them.

One set of sites serves all runs here, one after the other, as sites do.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from federations import (
    SITES,
    Process,
    adapter,
    close,
    commands,
    in_one_process,
    is_open,
    named,
    pid_of,
    rounds_done,
    running,
    wait_for,
    write_federation,
)
from fedmllm.remote.files import FederationFile
from fedmllm.remote.keys import make
from fedmllm.remote.supervisor import environment, free_port, tool
from fedmllm.storage.run_dir import RunDir

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.timeout(2400), pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("federation")


@pytest.fixture(scope="module")
def federation(root: Path, tiny: Path) -> Path:
    return write_federation(root, tiny)


@pytest.fixture(scope="module")
def sites(root: Path, federation: Path) -> Iterator[dict[str, Process]]:
    started = {name: Process(root / f"{name}.log", "client", root / name / "site.toml") for name in SITES}
    with running(*started.values()):
        yield started


def serve(federation: Path, out: Path, *more: str) -> Process:
    return Process(out.with_suffix(".log"), "server", federation, "--out", out, "--json", *more)


def finished(server: Process, seconds: float = 2000) -> dict[str, Any]:
    status, text = server.result(seconds)
    assert status == 0, server.said()[-4000:]
    result: dict[str, Any] = json.loads(text)
    return result


@pytest.fixture(scope="module")
def expected(federation: Path, root: Path) -> dict[str, torch.Tensor]:
    in_one_process(federation, root / "in-one")
    return adapter(root / "in-one")


def test_three_sites_end_with_the_adapter_of_one_process_though_a_supernode_is_killed(
    root: Path, federation: Path, sites: dict[str, Process], expected: dict[str, torch.Tensor]
) -> None:
    """Killed in the second of three rounds: that costs time and nothing else."""
    out = root / "node-killed"
    server = serve(federation, out)
    with running(server):
        wait_for(lambda: rounds_done(out) == 1, 1500)
        before = pid_of("fedmllm.remote.supernode", str(root / "keys" / "south.key"))
        os.kill(before, signal.SIGKILL)
        result = finished(server)
        assert pid_of("fedmllm.remote.supernode", str(root / "keys" / "south.key")) != before
    assert "SuperNode ended with status -9" in sites["south"].said()
    assert close(adapter(out), expected)
    alone = RunDir(root / "in-one").result()
    assert result["per_client"] == named(alone["per_client"]), "what each holds, from the counts it told"
    for key in ("metrics", "rounds", "bytes_up", "bytes_down", "refused_updates"):
        assert result[key] == alone[key], key
    assert all(site.popen.poll() is None for site in sites.values()), "sites go on waiting for the next run"


def test_a_superlink_killed_in_a_round_comes_back_and_the_run_goes_on(
    root: Path, federation: Path, sites: dict[str, Process], expected: dict[str, torch.Tensor]
) -> None:
    out = root / "link-killed"
    server = serve(federation, out)
    with running(server):
        wait_for(lambda: rounds_done(out) == 2, 1500)
        os.kill(pid_of("fedmllm.remote.superlink", str(federation.parent)), signal.SIGKILL)
        result = finished(server)
    said = server.said()
    assert "SuperLink ended with status -9" in said
    assert "the run failed after round" in said
    assert result["rounds"] == 3
    assert close(adapter(out), expected)


@pytest.mark.slow
def test_flwr_run_submits_the_shipped_app_to_a_superlink_that_is_there(
    root: Path, federation: Path, sites: dict[str, Process], expected: dict[str, torch.Tensor]
) -> None:
    """For those who start the SuperLink by themselves; the sites do not know the difference."""
    state, out = federation.parent / "state", root / "submitted"
    settings = f'experiment="{state / "experiment.toml"}" out="{out}"'
    port = FederationFile(federation, []).port
    with superlink_on(root, port, state / "superlink.db", state / "flower"):
        command = [tool("flwr"), "run", str(ROOT / "examples" / "flower"), "here", "-c", settings]
        subprocess.run(command, env=environment(state / "flower"), check=True, capture_output=True, timeout=600)
        wait_for((out / "result.json").is_file, 1500)
    assert close(adapter(out), expected)


@pytest.mark.slow
def test_a_site_whose_update_is_nan_is_refused_by_name_and_the_others_go_on(
    root: Path, federation: Path, sites: dict[str, Process], tiny: Path
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    broken = root / "south" / "broken"
    model = AutoModelForImageTextToText.from_pretrained(tiny)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    AutoProcessor.from_pretrained(tiny).save_pretrained(broken)
    assert sites["south"].end() == 0
    file = root / "south" / "broken.toml"
    file.write_text('model = "broken"\n' + (root / "south" / "site.toml").read_text())
    spoilt = Process(root / "broken.log", "client", file)
    server = serve(federation, root / "nan", "--set", "train.rounds=1")
    with running(server, spoilt):
        result = finished(server)
        assert spoilt.end() == 0
    (record,) = RunDir(root / "nan").rounds()
    assert [(r["client"], r["why"].partition(" in ")[0]) for r in record["refused"]] == [(1, "NaN or infinity")]
    assert result["refused_updates"] == 1
    assert all(bool(torch.isfinite(t).all()) for t in adapter(root / "nan").values())


def test_everything_that_was_started_is_ended(root: Path, sites: dict[str, Process]) -> None:
    for site in sites.values():
        if site.popen.poll() is None:
            assert site.end() == 0
    left = wait_for(lambda: {} if any(str(root) in text for text in commands().values()) else {"none": True}, 20)
    assert left == {"none": True}


def test_a_server_that_is_interrupted_ends_what_it_started(root: Path, federation: Path) -> None:
    server = serve(federation, root / "interrupted")
    with running(server):
        wait_for(lambda: "submitted" in server.said(), 600)
        server.popen.send_signal(signal.SIGINT)
        status, _ = server.result(300)
    assert status == 130
    assert "interrupted: the same command with --resume" in server.said()
    wait_for(lambda: not [text for text in commands().values() if str(root) in text], 30)


# Who is not let in


@contextmanager
def superlink_on(root: Path, port: int, database: Path, home: Path) -> Iterator[None]:
    keys = root / "keys"
    command = [
        sys.executable, "-m", "fedmllm.remote.superlink", "--host", "127.0.0.1", "--port", str(port),
        "--ssl-ca-certfile", str(keys / "ca.crt"), "--ssl-certfile", str(keys / "server.crt"),
        "--ssl-keyfile", str(keys / "server.key"), "--enable-supernode-auth", "--database", str(database),
    ]  # fmt: skip
    with (root / "superlink.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment(home), stdout=log, stderr=log)
    try:
        wait_for(lambda: is_open(port), 300)
        yield
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def superlink(root: Path, federation: Path) -> Iterator[int]:
    """A SuperLink where nobody is registered; its port."""
    port = free_port()
    with superlink_on(root, port, root / "other.db", root / "home"):
        yield port


def _supernode(root: Path, port: int, *more: str) -> int:
    """The exit status of a SuperNode that gives up soon."""
    command = [tool("flower-supernode"), "--superlink", f"127.0.0.1:{port}", "--port", str(free_port()), "--max-retries", "2"]
    with (root / "supernode.log").open("ab") as log:  # no pipe: what it starts would hold it open
        node = subprocess.Popen(
            [*command, *more], env=environment(root / "home"), stdout=log, stderr=log, start_new_session=True
        )
    try:
        return node.wait(300)
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


def test_a_node_that_is_not_registered_is_refused(root: Path, superlink: int) -> None:
    make(root / "stranger", [], ["stranger"])
    known = ["--root-certificates", str(root / "keys" / "ca.crt")]
    key = ["--auth-supernode-private-key", str(root / "stranger" / "stranger.key")]
    assert _supernode(root, superlink, *known, *key) != 0
    assert "No SuperNode found with the given public key" in (root / "superlink.log").read_text()


def test_a_node_without_a_key_is_refused(root: Path, superlink: int) -> None:
    assert _supernode(root, superlink, "--root-certificates", str(root / "keys" / "ca.crt")) != 0


def test_a_server_under_another_authority_is_not_believed(root: Path, superlink: int) -> None:
    make(root / "impostor", ["127.0.0.1"], [])
    with pytest.raises(ssl.SSLCertVerificationError):
        _request(superlink, ssl.create_default_context(cafile=root / "impostor" / "ca.crt"))
    assert _request(superlink, ssl.create_default_context(cafile=root / "keys" / "ca.crt")) in (200, 404)
    wrong = ["--root-certificates", str(root / "impostor" / "ca.crt")]
    assert _supernode(root, superlink, *wrong, "--auth-supernode-private-key", str(root / "keys" / "north.key")) != 0


def _request(port: int, context: ssl.SSLContext | None) -> int:
    """The status of a GET, over TLS where there is a context."""
    made: http.client.HTTPConnection
    if context is None:
        made = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    else:
        made = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
    try:
        made.request("GET", "/")
        return made.getresponse().status
    finally:
        made.close()


def test_a_plain_client_on_the_tls_port_gets_nothing(superlink: int) -> None:
    with pytest.raises((http.client.HTTPException, OSError)):
        _request(superlink, None)


def test_no_port_is_taken_that_is_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert taken.getsockname()[1] not in {free_port() for _ in range(50)}
