"""A sweep over Ray: each run has a process of its own on some machine of the cluster, with a GPU or a share of the cores.

Its files are where `fedmllm sweep` looks for them, so on several machines the sweep's folder must be on a disk that all share.
"""

from __future__ import annotations

import io
import os
import runpy
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from fedmllm.experiment.processes import last_line
from fedmllm.fleets.options import RayOptions
from fedmllm.remote.actors import resources, room

RETRIES = 2
"""How often a run is begun again, at its checkpoint, where the machine that had it dies."""


def _run(command: Sequence[str], file: str, home: str, threads: int) -> tuple[int, str]:
    """The task: `fedmllm` in Ray's process, which ends with it, so that whoever ends the task ends the run."""
    import torch

    if not Path(file).is_file():
        return 2, f"{socket.gethostname()} does not see {file}; give an --out that all machines of the cluster share."
    os.chdir(home)
    sys.argv = ["fedmllm", *command]
    torch.set_num_threads(threads)
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        try:
            runpy.run_module("fedmllm", run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None), last_line(said.getvalue())
    return 0, ""


class RayTasks:
    """A `sweep.Launcher` on the cluster that this process is connected to. `jobs` runs at a time, by default one a GPU, or one
    to four cores where there is none. Raises ConfigError where the cluster has not that many."""

    def __init__(self, jobs: int | None) -> None:
        import ray

        self.jobs, cpus, gpus = resources(RayOptions(actors=jobs), room(), "--jobs")
        self._threads = max(1, int(cpus))
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, max_calls=1)(_run)
        self._under_way: set[Any] = set()
        self._guard = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], file: Path) -> tuple[int, str]:
        import ray

        with self._guard:
            if self._stopped:
                return 130, "interrupted"
            sent = self._task.remote(list(command), str(file.absolute()), str(Path.cwd()), self._threads)
            self._under_way.add(sent)
        try:
            status, said = ray.get(sent)
            return status, said
        except ray.exceptions.RayError as error:
            return 1, f"its machine died ({type(error).__name__})"
        finally:
            with self._guard:
                self._under_way.discard(sent)

    def stop(self) -> None:
        import ray

        with self._guard:
            self._stopped = True
            for sent in self._under_way:
                ray.cancel(sent, force=True)


__all__ = ["RayTasks"]
