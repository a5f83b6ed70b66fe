"""Flower's SuperLink, restricted: other machines reach the Fleet API only; all other paths answer requests from this machine.

Sites, the command line and the process of a run share one port, and plain Flower lets anyone who reaches it submit code to all
sites. Behind a proxy on this machine every caller appears local, so such a proxy must pass `/v1/fleet` only.

    python -m fedmllm.remote.superlink [options of flower-superlink]
"""

from __future__ import annotations

import ipaddress

from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

FLEET = "/v1/fleet"


def is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


class LocalOnly:
    """Answers 403 to requests from other machines for anything but the Fleet API."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            host = (scope.get("client") or ("", 0))[0]
            path = str(scope["path"])
            is_fleet = path.startswith(f"{FLEET}/") and ".." not in path
            if not is_fleet and not is_local(host):
                await PlainTextResponse("only from the server's own machine\n", 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def main() -> None:
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink

    others = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(LocalOnly), *others())
    flower_superlink()


if __name__ == "__main__":
    main()
