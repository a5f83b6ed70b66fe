"""A worker's Unix socket: one message in, one back, each a safetensors file behind its length of eight bytes.

Only the user that runs the site may connect: the socket's permissions are 0600, and it is in a folder of its own, 0700.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from fedmllm.remote.protocol import Job, ProtocolError, Reply, parts_of, to_bytes
from fedmllm.remote.site import Worker

_LENGTH = struct.Struct("<Q")


def _receive(connection: socket.socket) -> bytes:
    """Raises ConnectionError where the other side ends in the middle."""
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return _exactly(connection, length)


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts, missing = [], count
    while missing:
        part = connection.recv(min(missing, 1 << 20))
        if not part:
            raise ConnectionError("the other side went away in the middle of a message")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _send(connection: socket.socket, content: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(content)))
    connection.sendall(content)


def ask(path: Path, job: Job, timeout: float | None = None) -> Reply:
    """The worker's reply. Raises ConnectionError where there is no worker, TimeoutError after `timeout` seconds, and
    ProtocolError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(path))
        except OSError as error:
            raise ConnectionError(f"no worker at {path}: {error.strerror}") from None
        _send(connection, to_bytes(job))
        return Reply.of(*parts_of(_receive(connection)))


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A listening socket that only its owner may connect to, removed at the end."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # the permissions must be right from the first moment
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    try:
        listener.listen()
        yield listener
    finally:
        listener.close()
        path.unlink(missing_ok=True)


def serve(listener: socket.socket, worker: Worker) -> None:
    """Answer one connection after the other, until the listener is closed. A broken one ends nothing but itself."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            _send(connection, to_bytes(_answer(connection, worker)))


def _answer(connection: socket.socket, worker: Worker) -> Reply:
    try:
        return worker.answer([Job.of(*parts_of(_receive(connection)))])[0]
    except ProtocolError as error:
        return Reply(problem=f"cannot read the job: {error}")


__all__ = ["ask", "listening", "serve"]
