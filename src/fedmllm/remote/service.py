"""A site's worker as a process: `python -m fedmllm.remote.service SITE.toml SOCKET`. It keeps the model between jobs."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from fedmllm.remote.files import read_site
from fedmllm.remote.processes import die_with_parent
from fedmllm.remote.site import Worker
from fedmllm.remote.socket import listening, serve


def main(file: Path, socket: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    die_with_parent()
    site = read_site(file)
    with listening(socket) as listener:
        serve(listener, Worker(Path(site.state) / "memory", site.own))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
