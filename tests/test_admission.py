"""Who is not admitted to a federation: nodes with an unknown key or none, and servers of another authority."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from federations import superlink_on
from fedmllm.remote.keys import make
from fedmllm.remote.supervisor import environment, free_port, tool

pytestmark = [
    pytest.mark.timeout(2400),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys of a server and a site."""
    root = tmp_path_factory.mktemp("admission")
    make(root / "keys", ["127.0.0.1"], ["north"])
    return root


@pytest.fixture(scope="module")
def superlink(root: Path) -> Iterator[int]:
    """The port of a SuperLink with which nobody is registered."""
    port = free_port()
    with superlink_on(root, port, root / "other.db", root / "home"):
        yield port


def supernode_status(root: Path, port: int, *options: str) -> int:
    """The exit status of a SuperNode that gives up soon."""
    command = [tool("flower-supernode"), "--superlink", f"127.0.0.1:{port}", "--port", str(free_port()), "--max-retries", "2"]
    with (root / "supernode.log").open("ab") as log:  # not a pipe, which the node's children would keep open
        node = subprocess.Popen(
            [*command, *options], env=environment(root / "home"), stdout=log, stderr=log, start_new_session=True
        )
    try:
        return node.wait(300)
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


def test_an_unregistered_node_is_refused(root: Path, superlink: int) -> None:
    make(root / "stranger", [], ["stranger"])
    authority = ["--root-certificates", str(root / "keys" / "ca.crt")]
    key = ["--auth-supernode-private-key", str(root / "stranger" / "stranger.key")]
    assert supernode_status(root, superlink, *authority, *key) != 0
    assert "No SuperNode found with the given public key" in (root / "superlink.log").read_text()


def test_a_node_without_a_key_is_refused(root: Path, superlink: int) -> None:
    assert supernode_status(root, superlink, "--root-certificates", str(root / "keys" / "ca.crt")) != 0


def test_a_server_of_another_authority_is_not_trusted(root: Path, superlink: int) -> None:
    make(root / "impostor", ["127.0.0.1"], [])
    with pytest.raises(ssl.SSLCertVerificationError):
        get_status(superlink, ssl.create_default_context(cafile=root / "impostor" / "ca.crt"))
    assert get_status(superlink, ssl.create_default_context(cafile=root / "keys" / "ca.crt")) in (200, 404)
    wrong = ["--root-certificates", str(root / "impostor" / "ca.crt")]
    assert supernode_status(root, superlink, *wrong, "--auth-supernode-private-key", str(root / "keys" / "north.key")) != 0


def get_status(port: int, context: ssl.SSLContext | None) -> int:
    """The status of a GET, over TLS if there is a context."""
    connection: http.client.HTTPConnection
    if context is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    else:
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_client_without_tls_gets_no_answer(superlink: int) -> None:
    with pytest.raises((http.client.HTTPException, OSError)):
        get_status(superlink, None)


def test_a_free_port_is_not_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert taken.getsockname()[1] not in {free_port() for _ in range(50)}
