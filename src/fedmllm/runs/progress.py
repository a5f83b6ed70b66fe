"""Progress on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from fedmllm.errors import printable

ProgressCallback = Callable[[str, int, int, str], None]
"""(stage, done, total, note): called as a long task proceeds. `total` is 0 for a stage without a count."""


def no_progress(stage: str, done: int, total: int, note: str) -> None:
    """A `ProgressCallback` that shows nothing."""


class ProgressBars:
    """A `ProgressCallback` for people. As a context manager, it removes its bars even after an error."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, TextColumn("{task.fields[note]}", markup=False), console=Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBars:
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        note = printable(note)  # it may quote the data
        if not self._live:
            count = f" {done}/{total}" if total else ""
            print(f"{stage}{count}: {note}", file=sys.stderr, flush=True)
        elif total:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total, note="")
            self._bars.update(self._tasks[stage], completed=done, note=note)
        else:
            self._bars.console.print(f"{stage}: {note}", style="dim", markup=False)
