"""Who may send what to a SuperLink or a SuperNode: other users of the machine, other machines, and strangers."""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import FAB_MAX_SIZE, FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from starlette.responses import PlainTextResponse

from federations import wait_for
from fedmllm.remote import superlink, supernode
from fedmllm.remote.loopback import is_own
from fedmllm.remote.superlink import MAX_BODY, MAX_STRANGER, LocalOnly

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which user a connection comes from")
NOBODY = 65534

# Whose connection it is


@linux
@pytest.mark.parametrize(
    ("family", "host", "target"),
    [(socket.AF_INET, "127.0.0.1", "127.0.0.1"), (socket.AF_INET, "0.0.0.0", "127.8.0.1"), (socket.AF_INET6, "::1", "::1"),
     (socket.AF_INET6, "::", "127.0.0.1"), (socket.AF_INET6, "::", "::ffff:127.0.0.1"), (socket.AF_INET6, "::", "::1")],
)  # fmt: skip
def test_a_connection_of_this_user_is_recognised(
    family: socket.AddressFamily, host: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::") as listening:
        client_family = socket.AF_INET6 if ":" in target else socket.AF_INET
        with socket.socket(client_family) as client:
            client.connect((target, listening.getsockname()[1]))
            accepted, address = listening.accept()
            with accepted:
                ends = address[:2], accepted.getsockname()[:2]
                assert is_own(*ends)
                assert not is_own((ends[0][0], ends[0][1] ^ 1), ends[1]), "another port"
                assert not is_own(ends[1], (ends[0][0], 1)), "another server"
                with monkeypatch.context() as patch:
                    patch.setattr(os, "geteuid", lambda: os.getuid() + 7)
                    assert not is_own(*ends), "another user"
                client.shutdown(socket.SHUT_WR)
                assert not is_own(*ends), "no longer open: the kernel no longer says whose it was"


@pytest.mark.parametrize(
    "host", ["10.0.0.7", "::ffff:10.0.0.7", "fe80::1", "fe80::1%eth0", "", "localhost", "127.0.0.1", "::1"]
)
def test_no_other_address_is_own(host: str) -> None:
    """A proxy may announce any address in a header, and Flower's HTTP server believes it: there is no such connection."""
    if sys.platform == "linux" or not host.startswith(("127", "::1")):
        assert not is_own((host, 0), ("127.0.0.1", 9092))
        assert not is_own((host, 4000), (host, 9092))


# What they may send


def answer_to(
    path: str, client: str, headers: dict[str, str] | None = None, fleet: bool = True, **scope: Any
) -> tuple[int, str]:
    """Status and text of the answer to a request from `client`; 200 if it reaches Flower."""
    answer: dict[str, Any] = {}

    async def send(message: Any) -> None:
        answer.update(message)

    async def receive() -> Any:
        raise AssertionError("a body is read")

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "path": path, "client": (client, 5), "method": "POST", "headers": raw, **scope}
    asyncio.run(LocalOnly(PlainTextResponse("Flower"), fleet)(scope, receive, send))
    return answer.get("status", 0), answer.get("body", b"").decode()


@pytest.fixture
def by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 is this user, and every other address somebody else."""
    monkeypatch.setattr(superlink, "is_own", lambda client, server: client[0] == "127.0.0.1")


OTHER_PATHS = [
    "/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/runtime/get-nodes", "/docs", "/", "/health", "/v1/fleetx",
    "/v1/fleet", "/v1/fleet/../control/start-run", "//v1/fleet/x", "/V1/fleet/x",
]  # fmt: skip


@pytest.mark.usefixtures("by_address")
@pytest.mark.parametrize("path", OTHER_PATHS)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_others_reach_the_fleet_api_only(path: str, kind: str) -> None:
    extensions = {"extensions": {"websocket.http.response": {}}}
    assert answer_to(path, "127.0.0.1") == (200, "Flower")
    for client in ("10.0.0.7", "127.0.0.2", ""):
        assert answer_to("/v1/fleet/pull-messages", client) == (200, "Flower")
        status, text = answer_to(path, client, type=kind, **extensions)
        assert (status, text.strip()) == (403, "only for the user who runs this process, on its own machine")
        assert answer_to("/v1/fleet/pull-messages", client, fleet=False)[0] == 403, "a SuperNode has no Fleet API"


@pytest.mark.usefixtures("by_address")
@pytest.mark.parametrize(
    ("path", "headers", "status", "reason"),
    [
        ("/v1/runtime/push-object", {"content-length": str(MAX_BODY)}, 200, "Flower"),
        ("/v1/runtime/push-object", {"content-length": str(MAX_BODY + 1)}, 413,
         f"the body has {MAX_BODY + 1} bytes, and {MAX_BODY} are accepted; send tensors in smaller pieces"),
        ("/v1/control/start-run", {"content-length": str(10**30)}, 413, f"the body has {10**30} bytes"),
        ("/v1/fleet/activate-node", {"content-length": str(MAX_STRANGER)}, 200, "Flower"),
        ("/v1/fleet/push-object", {"content-length": str(MAX_STRANGER + 1)}, 413,
         f"the body has {MAX_STRANGER + 1} bytes, and {MAX_STRANGER} are accepted; register the site's key"),
        ("/v1/fleet/push-object", {"transfer-encoding": "chunked"}, 411, "header Content-Length"),
        ("/v1/fleet/push-object", {"transfer-encoding": "gzip, chunked", "content-length": "3"}, 411, "no Transfer-Encoding"),
        ("/v1/runtime/push-object", {"transfer-encoding": "chunked"}, 411, "header Content-Length"),
        ("/v1/fleet/pull-messages", {}, 200, "Flower"),
    ],
)  # fmt: skip
def test_long_bodies_are_refused_before_they_are_read(path: str, headers: dict[str, str], status: int, reason: str) -> None:
    answer = answer_to(path, "127.0.0.1", headers)
    assert answer[0] == status
    assert reason in answer[1]


def test_what_flower_sends_is_accepted() -> None:
    assert 2 * max(FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, FAB_MAX_SIZE) <= MAX_BODY


class Registry:
    """Flower's state, as far as it knows the keys of nodes."""

    def __init__(self, *keys: bytes) -> None:
        self.keys = keys

    def get_node_id_by_public_key(self, key: bytes) -> int | None:
        return 7 if key in self.keys else None


def signed(key: ec.EllipticCurvePrivateKey, size: int, **changes: str) -> dict[str, str]:
    """The headers of a node's request, as Flower writes them."""
    time = now().isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, time.encode())).decode(),
        TIMESTAMP_HEADER: time,
        "content-length": str(size),
    } | changes


def test_only_registered_sites_may_send_long_bodies() -> None:
    site, stranger = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    registry = Registry(public_key_to_bytes(site.public_key()))
    app = SimpleNamespace(state=SimpleNamespace(linkstate_factory=SimpleNamespace(state=lambda: registry)))
    old = "2020-01-01T00:00:00+00:00"
    for key, size, changes, status in (
        (site, MAX_BODY, {}, 200),
        (site, MAX_BODY + 1, {}, 413),
        (stranger, MAX_STRANGER + 1, {}, 413),
        (stranger, MAX_STRANGER, {}, 200),  # Flower refuses it itself
        (stranger, MAX_STRANGER + 1, {FLEET_HTTP_PUBLIC_KEY_HEADER: signed(site, 1)[FLEET_HTTP_PUBLIC_KEY_HEADER]}, 413),
        (site, MAX_STRANGER + 1, {TIMESTAMP_HEADER: old}, 413),
        (site, MAX_STRANGER + 1, {FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(site, old.encode())).decode()}, 413),
        (site, MAX_STRANGER + 1, {FLEET_HTTP_SIGNATURE_HEADER: "é".encode("latin-1").decode("latin-1")}, 413),
        (site, MAX_STRANGER + 1, {FLEET_HTTP_PUBLIC_KEY_HEADER: "!"}, 413),
        (site, MAX_STRANGER + 1, {TIMESTAMP_HEADER: ""}, 413),
    ):
        assert answer_to("/v1/fleet/push-object", "10.0.0.7", signed(key, size, **changes), app=app)[0] == status, changes


# Over real connections


@pytest.fixture
def port() -> Iterator[int]:
    """A server of Flower's kind behind `LocalOnly`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = LocalOnly(PlainTextResponse("Flower"))
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", ws="none", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        wait_for(lambda: server.started, 10)
        yield int(listening.getsockname()[1])
        server.should_exit = True
        thread.join()


REQUEST = """
import encodings.idna, http.client, os, sys  # now, as another user may not read this Python's files
os.setuid(int(sys.argv[2])) if len(sys.argv) > 2 else None
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
connection.request("POST", "/v1/runtime/acquire-task")
print(connection.getresponse().status)
"""


@linux
def test_the_server_answers_processes_of_its_user(port: int) -> None:
    command = [sys.executable, "-SE", "-c", REQUEST, str(port)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "200\n"
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        for _ in range(3):
            connection.request("POST", "/v1/control/list-runs")
            assert connection.getresponse().read() == b"Flower"
        connection.request("POST", "/v1/control/list-runs", headers={"X-Forwarded-For": "127.0.0.1"})
        assert connection.getresponse().status == 403, "a proxy that says that it is local"


@linux
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may become another user")
def test_the_server_refuses_processes_of_another_user(port: int) -> None:
    command = [sys.executable, "-SE", "-c", REQUEST, str(port), str(NOBODY)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "403\n"


@linux
def test_a_refused_body_is_not_received(port: int) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.putrequest("POST", "/v1/runtime/push-object")
        connection.putheader("Content-Length", str(MAX_BODY + 1))
        connection.endheaders()
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("connection")) == (413, "close")


# Where Flower calls it


def test_it_comes_before_everything_of_flowers(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.superlink import cli, extensions
    from flwr.superlink import main as flower
    from flwr.supernode import main as node

    first: list[object] = []
    monkeypatch.setattr(extensions, "get_middleware", extensions.get_middleware)
    monkeypatch.setattr(cli, "flower_superlink", lambda: first.append(flower._get_middleware()[0].cls))
    superlink.main()
    monkeypatch.setattr(node, "create_app", node.create_app)
    supernode.restrict_runtime()
    middleware = node.create_app().user_middleware[0]
    assert [*first, middleware.cls] == [LocalOnly, LocalOnly]
    assert middleware.kwargs == {"fleet": False}
