"""A site's long-lived worker process: it keeps the model, the features of pictures and the clients' memory, and answers over a
Unix socket.

    python -m fedmllm.remote.service SITE.toml SOCKET
"""

from __future__ import annotations

import hashlib
import signal
import sys
from collections import OrderedDict
from pathlib import Path

from fedmllm.registry import plugin_files
from fedmllm.remote.files import SiteFile
from fedmllm.remote.protocol import Job, ProtocolError, Reply, parts_of, to_bytes
from fedmllm.remote.wire import serve
from fedmllm.remote.worker import Worker

CAPACITY = 4
"""The number of replies that are kept for repeated jobs."""


class ReplyCache:
    """Maps the bytes of a job to the bytes of its reply, and remembers the latest replies to `train` jobs.

    A job that arrives again, because its reply was lost, gets the same reply. Training again would be correct for the latest
    round, but not if a later round has been trained in between.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._replies: OrderedDict[bytes, bytes] = OrderedDict()

    def __call__(self, content: bytes) -> bytes:
        key = hashlib.sha256(content).digest()
        if key in self._replies:
            return self._replies[key]
        try:
            job = Job.of(*parts_of(content))
        except ProtocolError as error:
            return to_bytes(Reply(problem=str(error)))
        reply = self.worker.answer([job])[0]
        packed = to_bytes(reply)
        if job.kind == "train" and not reply.problem:
            self._replies[key] = packed
            while len(self._replies) > CAPACITY:
                self._replies.popitem(last=False)
        return packed


def main(site: Path, socket: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        # The kernel ends the process, whatever it is doing; a handler of Python's would wait for the end of a job or of a
        # regular expression. Nothing is lost: files are replaced atomically, and `fedmllm client` removes the socket's folder.
        signal.signal(number, signal.SIG_DFL)
    file = SiteFile(site)

    def log(line: str) -> None:
        print(f"{file.name}: {line.rstrip()}", file=sys.stderr, flush=True)

    replies = ReplyCache(Worker(file.state / "clients", file.data, log, plugin_files()))
    log(f"worker listens on {socket}")
    serve(socket, replies)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
