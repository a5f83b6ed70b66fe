"""Flower's SuperLink, restricted: the Fleet API is for sites, and every other path for processes of the user who runs it.

Sites, the command line and the process of a run share one port, and plain Flower lets anyone who reaches it submit code to all
sites. A proxy on this machine that the same user runs appears as that user, so it must pass `/v1/fleet` only.

    python -m fedmllm.remote.superlink [options of flower-superlink]
"""

from __future__ import annotations

from base64 import b64decode

from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedmllm.remote.loopback import is_own

FLEET = "/v1/fleet"
MAX_BODY = 64 << 20
"""Bytes of a request's body. Flower sends tensors in pieces of 5 MiB, an app in one of 10 MiB at most, and some 150 bytes a
tensor in the list of a message's pieces."""
MAX_STRANGER = 64 << 10
"""Bytes of a request to the Fleet API that no registered site has signed. Flower reads a body before it checks signatures."""


class LocalOnly:
    """Refuses, before Flower reads a body, other users' requests for anything but the Fleet API (403), and bodies that are too
    long (413) or do not announce their length (411). Without `fleet`, everything is refused to others."""

    def __init__(self, app: ASGIApp, fleet: bool = True) -> None:
        self._app, self._fleet = app, fleet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and (refusal := await self._refusal(scope)):
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        path, headers = str(scope["path"]), dict(scope["headers"])
        for_sites = self._fleet and path.startswith(f"{FLEET}/") and ".." not in path
        if not for_sites and not is_own(scope.get("client") or ("", 0), scope.get("server") or ("", 0)):
            return _closing("only for the user who runs this process, on its own machine", 403)
        if b"transfer-encoding" in headers:
            return _closing("send the body's length in the header Content-Length, and no Transfer-Encoding", 411)
        size, limit = int(headers.get(b"content-length", b"0")), MAX_BODY
        advice = "send tensors in smaller pieces, as Flower does unless FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE is set"
        if for_sites and size > MAX_STRANGER and not await run_in_threadpool(_is_registered, Request({**scope, "state": {}})):
            limit, advice = MAX_STRANGER, "register the site's key with the server to send more"
        return _closing(f"the body has {size} bytes, and {limit} are accepted; {advice}", 413) if size > limit else None


def _closing(text: str, status: int) -> PlainTextResponse:
    """A refusal that closes the connection, so that the rest of the body is not read."""
    return PlainTextResponse(f"{text}\n", status, {"connection": "close"})


def _is_registered(request: Request) -> bool:
    """Whether a registered site has signed the request. Flower's own check runs later, as it needs the body."""
    from fastapi import HTTPException
    from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
    from flwr.superlink.dependencies.linkstate import get_linkstate
    from flwr.superlink.routers.fleet.node_auth import authenticate_node

    try:
        key = b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER])
        request.state.protobuf_request = RegisterNodeFleetRequest(public_key=key)
        authenticate_node(request)
    except (HTTPException, KeyError, ValueError):
        return False
    return get_linkstate(request).get_node_id_by_public_key(key) is not None


def main() -> None:
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink

    others = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(LocalOnly), *others())
    flower_superlink()


if __name__ == "__main__":
    main()
