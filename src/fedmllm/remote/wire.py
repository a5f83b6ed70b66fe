"""Requests to a worker process on the same machine, over a Unix socket that only its owner may open.

A message is its length (8 bytes, little endian) followed by its content. A connection carries one request and one answer. This
module does not import PyTorch, for the reason given in records.py.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

VERSION = 1
"""Version of the protocol (protocol.py). The server and all sites must have the same."""
MAX_BYTES = 8 << 30
"""The largest message that is accepted."""


class NoAnswer(ConnectionError):  # noqa: N818 (it says what happened)
    """The worker is not running, or went away before it answered."""


def receive(connection: socket.socket) -> bytes:
    """Raises NoAnswer if the other side closes the connection first, or announces more bytes than are allowed."""
    with connection.makefile("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if length > MAX_BYTES:
            raise NoAnswer(f"a message of {length} bytes is longer than fedmllm sends")
        content = stream.read(length)
    if len(prefix) < 8 or len(content) < length:
        raise NoAnswer("the worker closed the connection in the middle of a message")
    return content


def send(connection: socket.socket, content: bytes) -> None:
    connection.sendall(len(content).to_bytes(8, "little"))
    # An empty message is complete at this point. The other side may already have answered and closed the connection, in which
    # case sending nothing would fail.
    if content:
        connection.sendall(content)


def request(path: Path, content: bytes, patience: float, pause: float = 0.5) -> bytes:
    """Send a request to the worker and return its answer.

    If the worker is not running or goes away, the request is repeated for up to `patience` seconds. The time that a connected
    worker takes to answer is not limited. Raises NoAnswer.
    """
    end = time.monotonic() + patience
    while True:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(os.fspath(path))
                send(connection, content)
                return receive(connection)
        except OSError as error:  # includes NoAnswer
            if time.monotonic() >= end:
                raise NoAnswer(f"the site's worker does not answer ({error})") from None
            time.sleep(pause)


def serve(path: Path, answer: Callable[[bytes], bytes], stopped: Callable[[], bool] = lambda: False) -> None:
    """Answer one request after another until `stopped()`, which is called twice a second. The socket has permissions 0600."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        mask = os.umask(0o177)  # so that the permissions are right from the first moment
        try:
            listening.bind(os.fspath(path))
        finally:
            os.umask(mask)
        listening.listen()
        listening.settimeout(0.5)
        try:
            while not stopped():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                with connection, suppress(OSError):  # a caller that went away does not affect the next one
                    connection.settimeout(60.0)  # far longer than any transfer within one machine takes
                    send(connection, answer(receive(connection)))
        finally:
            path.unlink(missing_ok=True)
