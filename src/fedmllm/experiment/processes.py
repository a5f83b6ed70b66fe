"""Runs of a grid as processes of this machine.

Importing torch and transformers takes about three seconds, as long as a short run itself. So a server process imports them once
and forks for every run; it has done no work of its own, hence a run in its fork starts as a fresh one does.
Where there is no fork (Windows) each run imports for itself.
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
"""What nearly every run imports; the last is the pocket model's."""


def last_line(said: str) -> str:
    return (said.strip().splitlines()[-1:] or ["no message"])[0]


def _run(command: Sequence[str], said: str, threads: int) -> None:
    """In the run's own process: the command line, silent but for the file `said`."""
    with Path(said).open("wb") as file, Path(os.devnull).open("wb") as nothing:
        os.dup2(file.fileno(), 2)
        os.dup2(nothing.fileno(), 1)
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
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self._context = multiprocessing.get_context("forkserver") if forks else multiprocessing.get_context("spawn")
        self._context.set_forkserver_preload(PRELOAD)
        self._children: set[BaseProcess] = set()
        # multiprocessing asks after all children when it starts one, and two threads must not ask after the same.
        self._guard = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], file: Path) -> tuple[int, str]:
        """(exit status, the last line that it said); a run that a signal ended has 128 and its number as shells do."""
        with tempfile.TemporaryDirectory(prefix="fedmllm-", ignore_cleanup_errors=True) as folder:
            said = Path(folder) / "said"
            child = self._context.Process(target=_run, args=(list(command), str(said), self._threads))
            with self._guard:
                if self._stopped:
                    return 130, "interrupted"
                child.start()
                self._children.add(child)
            wait([child.sentinel])
            with self._guard:
                child.join()
                self._children.discard(child)
            status = child.exitcode or 0
            text = said.read_text(errors="replace") if said.exists() else ""
            return status if status >= 0 else 128 - status, last_line(text)

    def stop(self) -> None:
        with self._guard:
            self._stopped = True
            for child in self._children:
                child.terminate()
