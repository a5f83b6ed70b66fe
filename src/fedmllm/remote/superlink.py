"""Flower's SuperLink with all but the sites' own door closed to other machines: `python -m fedmllm.remote.superlink …`.

Flower serves three interfaces on one port. Nodes show a registered key to use the first, `/v1/fleet`. The control interface
(submit code to run here, register keys) asks for nothing, and the runtime one hands out tasks; a firewall cannot tell them
apart. Only this machine may use them here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any

from fedmllm.remote.processes import die_with_parent

OPEN = ("/v1/fleet/",)

Scope = dict[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Any, Send], Awaitable[None]]


def _here(scope: Scope) -> bool:
    """Whether the caller is on this machine."""
    client, server = (scope.get(side) or ("", 0) for side in ("client", "server"))
    try:
        return client[0] == server[0] or ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


class Closed:
    """Middleware that answers 403 to other machines, but for paths under `OPEN`."""

    def __init__(self, app: Asgi) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] == "lifespan" or _here(scope) or str(scope.get("path", "")).startswith(OPEN):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"only the server's own machine may ask for this\n"})
        else:
            await send({"type": "websocket.close", "code": 1008})


def main() -> None:
    from flwr.superlink import main as superlink
    from flwr.superlink.cli import flower_superlink

    die_with_parent()
    create = superlink.create_app

    def create_closed(*args: Any, **kwargs: Any) -> Any:
        app = create(*args, **kwargs)
        app.add_middleware(Closed)
        return app

    superlink.create_app = create_closed
    flower_superlink.flower_superlink()


if __name__ == "__main__":
    main()
