"""Runs of a sweep as processes of this machine.

Importing torch and transformers takes about three seconds, as long as a short run. So a server process imports them once and
forks for every run; it has done no work of its own, so a forked run starts like a fresh one. Without fork (Windows), every run
imports for itself.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOAD = [
    "fedmllm.cli.app",
    "fedmllm.runs.kinds",
    "fedmllm.report.tables",
    "peft",
    "transformers.models.idefics3.modeling_idefics3",
]
"""What nearly every run imports; the last one is for the pocket model."""


def last_line(output: str) -> str:
    return (output.strip().splitlines()[-1:] or ["no message"])[0]


def _run(command: Sequence[str], stderr: str, threads: int) -> None:
    """Run the command line in the child process, silent except for the file `stderr`."""
    with Path(stderr).open("wb") as file, Path(os.devnull).open("wb") as null:
        os.dup2(file.fileno(), 2)
        os.dup2(null.fileno(), 1)
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        os.environ["OMP_NUM_THREADS"] = str(threads)  # for processes that the run starts
        torch.set_num_threads(threads)
    sys.argv = ["fedmllm", *command]
    runpy.run_module("fedmllm", run_name="__main__")


class Processes:
    """A `sweep.Launcher`: runs on this machine, `jobs` at a time, which share its cores."""

    def __init__(self, jobs: int) -> None:
        self._threads = max(1, (os.cpu_count() or 1) // jobs)
        can_fork = "forkserver" in multiprocessing.get_all_start_methods()
        self._context = multiprocessing.get_context("forkserver") if can_fork else multiprocessing.get_context("spawn")
        self._context.set_forkserver_preload(PRELOAD)
        self._children: set[BaseProcess] = set()
        # multiprocessing polls all children whenever it starts one, and two threads must not poll the same child.
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], file: Path) -> tuple[int, str]:
        """(exit status, the last line on stderr); 128 plus the signal's number if a signal ended the run, as shells do."""
        with tempfile.TemporaryDirectory(prefix="fedmllm-", ignore_cleanup_errors=True) as folder:
            stderr = Path(folder) / "stderr"
            child = self._context.Process(target=_run, args=(list(command), str(stderr), self._threads))
            with self._lock:
                if self._stopped:
                    return 130, "interrupted"
                child.start()
                self._children.add(child)
            wait([child.sentinel])
            with self._lock:
                child.join()
                self._children.discard(child)
            status = child.exitcode or 0
            output = stderr.read_text(errors="replace") if stderr.exists() else ""
            return status if status >= 0 else 128 - status, last_line(output)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.terminate()
