"""How a long task says how far it is: a callback, the lines that its calls become, and a run's log of these lines."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from fedmllm.errors import failure, printable

ProgressCallback = Callable[[str, int, int, str], None]
"""(stage, done, total, note): called as a long task proceeds. `total` is 0 for a stage without a count."""

DETAIL = "detail"
"""The stage of messages for those who want to know more."""
MESSAGES = frozenset({"note", "privacy", DETAIL})
"""Stages that are over when they are announced."""
STEPS = frozenset({
    "checking prompts", "encoding questions", "encoding samples", "encoding pictures", "clients", "measuring", "training",
    "secure round", "testing", "asking",
})  # fmt: skip
"""Stages within others whose counted calls come at every step: each moves a bar, and few become lines."""
HEARTBEAT = 10.0
"""Seconds without any line after which a step becomes one."""
LOGGER = logging.getLogger("fedmllm")


def no_progress(stage: str, done: int, total: int, note: str) -> None:
    """A `ProgressCallback` that shows nothing."""


class TimeLeft:
    """(stage, done, total) -> the seconds that the stage still takes at its pace so far, None while that is unknown. A count
    that falls begins anew."""

    def __init__(self) -> None:
        self._stages: dict[str, tuple[float, int, int, int]] = {}

    def __call__(self, stage: str, done: int, total: int) -> float | None:
        now = time.monotonic()
        began, first, latest, before = self._stages.get(stage, (now, done, done, total))
        if done < latest or total != before:
            began, first = now, done
        self._stages[stage] = began, first, done, total
        return (now - began) * (total - done) / (done - first) if done > first else None


def clock(seconds: float) -> str:
    """ "0:07", "12:30" or "3:05:00"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class Lines:
    """A `ProgressCallback` that calls `write(stage, line)` for every call with a note, but for counted steps only after
    `HEARTBEAT` seconds without a line."""

    def __init__(self, write: Callable[[str, str], None]) -> None:
        self._write, self._left = write, TimeLeft()
        self._latest = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        left = self._left(stage, done, total) if total else None
        now = time.monotonic()
        if (now - self._latest < HEARTBEAT) if total and stage in STEPS else not note:
            return
        self._latest = now
        count = f" {done}/{total}" if total else ""
        ends = f"  {clock(left)} left" if left is not None and done < total else ""
        self._write(stage, printable(f"{stage}{count}{': ' if note else ''}{note}{ends}"))


class RunLog:
    """A `ProgressCallback` that passes every call on, and writes its `Lines` to the logger "fedmllm" and to the `run.log` of
    the run that is being done. Lines from before a run has a folder are kept for it."""

    def __init__(self, shown: ProgressCallback) -> None:
        self._shown, self._lines = shown, Lines(self._log)
        self._waiting: deque[str] = deque(maxlen=1000)
        self._file: int | None = None

    @classmethod
    def of(cls, progress: ProgressCallback) -> RunLog:
        """The callback itself if it is such a log."""
        return progress if isinstance(progress, RunLog) else cls(progress)

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        self._shown(stage, done, total, note)
        self._lines(stage, done, total, note)

    @contextmanager
    def kept_in(self, path: Path) -> Iterator[None]:
        """Append the lines to the file, and the error that ends the block. A file that cannot be written is noted, and the run
        goes on without it."""
        try:
            # The folder may be from elsewhere: a link is not followed, and a pipe without a reader is not waited for.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            self._file = os.open(path, flags, 0o666)
            self._flush()
        except OSError as error:
            self._close()
            self("note", 0, 0, f"{path} cannot be written ({error.strerror}); the run goes on without it")
        try:
            yield
        except BaseException as error:
            self._log("error", failure(error))
            raise
        finally:
            self._close()
            self._waiting.clear()

    def _log(self, stage: str, line: str) -> None:
        level = {DETAIL: logging.DEBUG, "error": logging.ERROR}.get(stage, logging.INFO)
        if LOGGER.hasHandlers():  # without any, Python would print the error, which the caller does as well
            LOGGER.log(level, "%s", line)
        self._waiting.append(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {line}\n")
        try:
            self._flush()
        except OSError:  # the disk is full, for example; the run's other files will say so if it matters to them
            self._close()

    def _flush(self) -> None:
        if self._file is not None:
            os.write(self._file, "".join(self._waiting).encode())
            self._waiting.clear()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None
