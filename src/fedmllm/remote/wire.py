"""Questions to a worker on the same machine, over a Unix socket that its owner alone may open. No PyTorch: see records.py.

A message is its length, 8 bytes little endian, and as many bytes; one question and one answer a connection.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

VERSION = 1
"""Of the protocol (protocol.py). Server and sites must have the same."""
MOST = 8 << 30
"""Bytes that a message may have."""


class NoAnswer(ConnectionError):  # noqa: N818 (it says what happened)
    """The worker is not there, or went away before it answered."""


def _read(connection: socket.socket, count: int) -> bytearray:
    content, at = bytearray(count), 0
    view = memoryview(content)
    while at < count:
        got = connection.recv_into(view[at:], min(count - at, 1 << 20))
        if not got:
            raise NoAnswer("the worker closed the connection in the middle of a message")
        at += got
    return content


def receive(connection: socket.socket) -> bytes:
    """Raises NoAnswer where the other side goes away first, or says that more is coming than can be."""
    length = int.from_bytes(_read(connection, 8), "little")
    if length > MOST:
        raise NoAnswer(f"a message of {length} bytes is none of ours")
    return bytes(_read(connection, length))


def send(connection: socket.socket, content: bytes) -> None:
    connection.sendall(len(content).to_bytes(8, "little"))
    if content:  # an empty message is whole by now: the other side may have answered and gone, and sending nothing would fail
        connection.sendall(content)


def ask(path: Path, content: bytes, patience: float, pause: float = 0.5) -> bytes:
    """The worker's answer. A worker that is not there is waited for, and one that went away is asked again when it is back,
    `patience` seconds in all without a connection; how long it thinks is its affair. Raises NoAnswer."""
    end = time.monotonic() + patience
    while True:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(os.fspath(path))
                send(connection, content)
                return receive(connection)
        except OSError as error:  # NoAnswer is one
            if time.monotonic() >= end:
                raise NoAnswer(f"the site's worker does not answer ({error})") from None
            time.sleep(pause)


def serve(path: Path, answer: Callable[[bytes], bytes], stopped: Callable[[], bool]) -> None:
    """Answer one question after the other until `stopped()`, looked at twice a second. The socket's permissions are 0600."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        mask = os.umask(0o177)  # from the first moment on, not after a chmod
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
                with connection:
                    connection.settimeout(60.0)  # on this machine no byte takes longer
                    try:
                        send(connection, answer(receive(connection)))
                    except OSError:  # whoever asked is gone; the next one is not the worse for it
                        continue
        finally:
            path.unlink(missing_ok=True)


__all__ = ["VERSION", "NoAnswer", "ask", "receive", "send", "serve"]
