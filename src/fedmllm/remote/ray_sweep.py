"""A sweep over Ray: each run has a process of its own on a machine of the cluster, with a GPU or a share of the cores.

The files of the runs are where `fedmllm sweep` looks for them, so on several machines the sweep's folder must be on a disk that
all of them share.
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

from fedmllm.errors import ConfigError
from fedmllm.experiment.processes import last_line
from fedmllm.fleets.options import RayOptions
from fedmllm.registry import load_plugin, plugin_files
from fedmllm.remote.cluster import actor_resources, cluster_resources

RETRIES = 2
"""How often a run is resumed from its checkpoint if its machine dies."""


def run_command(command: Sequence[str], file: str, folder: str, threads: int, plugins: Sequence[Path]) -> tuple[int, str]:
    """Ray's task: run `fedmllm` in this process, so that ending the task ends the run; (exit status, last line of its errors).

    `file` is the experiment file, `folder` the working folder of the sweep.
    """
    import torch

    if not Path(file).is_file():
        return 2, f"{socket.gethostname()} cannot read {file}; give an --out that all machines of the cluster share."
    try:
        for plugin in plugins:
            load_plugin(plugin)
    except ConfigError as error:
        return 2, f"{socket.gethostname()}: {error}"
    os.chdir(folder)
    sys.argv = ["fedmllm", *command]
    torch.set_num_threads(threads)
    errors = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(errors):
        try:
            runpy.run_module("fedmllm", run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None), last_line(errors.getvalue())
    return 0, ""


class RayTasks:
    """A `sweep.Launcher` on the cluster to which this process is connected.

    `jobs` is the number of runs at a time, by default one per GPU, or one per four cores without a GPU. Raises ConfigError if
    the cluster is too small.
    """

    def __init__(self, jobs: int | None) -> None:
        import ray

        self.jobs, cpus, gpus = actor_resources(RayOptions(actors=jobs), cluster_resources(), "--jobs")
        self._threads = max(1, int(cpus))
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, max_calls=1)(run_command)
        self._pending: set[Any] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], file: Path) -> tuple[int, str]:
        import ray

        with self._lock:
            if self._stopped:
                return 130, "interrupted"
            arguments = list(command), str(file.absolute()), str(Path.cwd()), self._threads, plugin_files()
            reference = self._task.remote(*arguments)
            self._pending.add(reference)
        try:
            status, message = ray.get(reference)
            return status, message
        except ray.exceptions.RayError as error:
            return 1, f"its machine died ({type(error).__name__})"
        finally:
            with self._lock:
                self._pending.discard(reference)

    def stop(self) -> None:
        import ray

        with self._lock:
            self._stopped = True
            for reference in self._pending:
                ray.cancel(reference, force=True)
