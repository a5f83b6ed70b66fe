"""Progress on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from threading import Lock
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from fedmllm.errors import printable
from fedmllm.progress import DETAIL, MESSAGES, STEPS, Lines, TimeLeft, clock

_SHOWN_AFTER = 0.5
"""Seconds after which the bar of a step is shown, so that short ones do not flicker."""
_REDRAWS = 4
"""A second; each takes about 2.5 ms of processor time."""


class _Count(ProgressColumn):
    """ "3/12", and nothing for a stage without a count."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


class _Time(ProgressColumn):
    """The time that is left, or that has passed as long as it is unknown."""

    def render(self, task: Task) -> Text:
        if (ends := task.fields["ends"]) is not None and not task.finished:
            return Text(f"{clock(max(0.0, ends - time.monotonic()))} left", style="cyan")
        return Text(clock(task.finished_time or task.elapsed or 0.0), style="dim")


class _Bars(Progress):
    """Without the steps that have just begun or are over."""

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        return super().make_tasks_table([task for task in tasks if task.description not in STEPS or _takes_time(task)])


def _takes_time(task: Task) -> bool:
    return not task.finished and (task.elapsed or 0.0) > _SHOWN_AFTER


class ProgressBars:
    """A `ProgressCallback` for people. As a context manager, it removes its bars even after an error."""

    def __init__(self, verbose: bool | None = None) -> None:
        """`verbose` shows details as well if true, nothing at all if false."""
        self._verbose, self._live = verbose, sys.stderr.isatty() and verbose is not False
        note = TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        columns = (TextColumn("{task.description}", markup=False), BarColumn(12), _Count(), _Time(), note)
        self._bars = _Bars(
            *columns,
            console=Console(stderr=True),
            expand=True,
            refresh_per_second=_REDRAWS,
            redirect_stdout=False,  # a result that goes to a file must not be taken for a line above the bars
            get_time=time.monotonic,
        )
        self._tasks: dict[str, TaskID] = {}
        self._uncounted: TaskID | None = None
        self._moved: dict[str, float] = {}
        self._left, self._lines = TimeLeft(), Lines(self._print)
        self._lock = Lock()  # the runs of a sweep begin in threads

    def __enter__(self) -> ProgressBars:
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._end_uncounted()
            for stage in STEPS & self._tasks.keys():
                self._bars.remove_task(self._tasks.pop(stage))
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        with self._lock:
            if not self._live or stage in MESSAGES:
                self._lines(stage, done, total, note)
                return
            self._end_uncounted()
            if total:
                self._move(stage, done, total, printable(note))  # it may quote the data
            else:
                self._uncounted = self._bars.add_task(stage, total=None, note=printable(note), ends=None)

    def _print(self, stage: str, line: str) -> None:
        if self._verbose is False or (stage == DETAIL and not self._verbose):
            return
        if self._live:
            self._bars.console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def _end_uncounted(self) -> None:
        if self._uncounted is not None:
            self._bars.remove_task(self._uncounted)
            self._uncounted = None

    def _move(self, stage: str, done: int, total: int, note: str) -> None:
        left, now = self._left(stage, done, total), time.monotonic()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, note=note, ends=None)
        task = self._bars.tasks[self._bars.task_ids.index(self._tasks[stage])]
        if done < task.completed or total != task.total:
            self._bars.reset(task.id, total=total)
        elif stage in STEPS and done < total and now - self._moved.get(stage, 0.0) < 0.5 / _REDRAWS:
            return
        self._moved[stage] = now
        ends = None if left is None else now + left
        self._bars.update(task.id, completed=done, note=note, ends=ends)
