"""A site's long-lived worker: it keeps the model, the pictures' features and the memory, and answers over a Unix socket.

python -m fedmllm.remote.service SITE.toml SOCKET
"""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict
from pathlib import Path

from fedmllm.remote.files import SiteFile
from fedmllm.remote.protocol import Job, ProtocolError, Reply, parts_of, to_bytes
from fedmllm.remote.site import Worker
from fedmllm.remote.supervisor import Stop
from fedmllm.remote.wire import serve

KEPT = 4
"""Replies that are kept for jobs which come again."""


class ReplyCache:
    """Bytes in, bytes out. A job that comes again, because its reply was lost, is given the same reply: training it twice
    would be right for this round, but not where a later one has been trained in between."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._known: OrderedDict[bytes, bytes] = OrderedDict()

    def __call__(self, content: bytes) -> bytes:
        key = hashlib.sha256(content).digest()
        if key in self._known:
            return self._known[key]
        try:
            job = Job.of(*parts_of(content))
        except ProtocolError as error:
            return to_bytes(Reply(problem=str(error)))
        reply = self._worker.answer([job])[0]
        made = to_bytes(reply)
        if job.kind == "train" and not reply.problem:
            self._known[key] = made
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return made


def main(site: Path, path: Path) -> None:
    file = SiteFile(site)

    def log(line: str) -> None:
        print(f"{file.name}: {line.rstrip()}", file=sys.stderr, flush=True)

    answers = ReplyCache(Worker(file.state / "clients", file.own, log))
    stop = Stop()
    log(f"worker listens on {path}")
    serve(path, answers, stop)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
