"""What a site does for a server at most: the table `[limits]` of its site file, and how each limit is enforced."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import Annotated

from pydantic import Field

from fedmllm.config import Table
from fedmllm.errors import ConfigError, brief, printable
from fedmllm.models.shipped import SHIPPED

GRACE = 60.0
"""Seconds after which a job that cannot be interrupted ends the worker's process, which is then restarted."""
_AGAIN = 5.0
"""Seconds between two attempts to interrupt a job: code that it calls may swallow the first."""
_ID = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)
"""The id of a model on the hub, or the name of a shipped one. Anything else would be opened as a path or a URL."""


class TimeIsUp(BaseException):
    """A job took longer than it may. Not an Exception, because libraries catch those and go on."""


class Limits(Table):
    """`seconds` and `samples` of one job, each sample counted once per epoch; `clients` of an experiment; `reply_bytes` of the
    tensors in one reply; `models` that a server may name.

    An entry of `models` is a pattern, such as "HuggingFaceTB/*". One that begins with "/" or "." allows folders of this
    machine; all others allow ids of the hub and shipped models, and never a folder.
    """

    seconds: Annotated[float, Field(gt=0, le=10_000_000)] = 14_400.0
    samples: Annotated[int, Field(ge=1)] = 1_000_000
    clients: Annotated[int, Field(ge=1)] = 10_000
    reply_bytes: Annotated[int, Field(ge=1)] = 1 << 30
    models: Annotated[tuple[str, ...], Field(strict=False)] = ("*",)

    def beside(self, folder: Path) -> Limits:
        """The same limits, with the folders in `models` relative to `folder` made absolute."""
        models = (str((folder / m).resolve()) if m.startswith(("/", ".")) else m for m in self.models)
        return self.model_copy(update={"models": tuple(models)})

    def check_clients(self, clients: int) -> None:
        """Raises ConfigError for an experiment with too many clients."""
        if clients > self.clients:
            raise ConfigError(
                f"partition.clients = {clients} is more than limits.clients = {self.clients} in this site's file."
            )

    def check_model(self, name: str) -> None:
        """Raises ConfigError unless the server may name this model."""
        is_id = name in SHIPPED or (_ID.fullmatch(name) is not None and not os.path.lexists(name))
        candidate = name if is_id else os.path.realpath(printable(name))
        if not any(fnmatchcase(candidate, pattern) for pattern in self.models if pattern.startswith("/") != is_id):
            what = "an id that" if is_id else "a path or an address, and"
            raise ConfigError(
                f"model.name = {brief(name, 100)!r} is {what} this site's file does not allow; add it to limits.models there, "
                "or give the site's own copy as `model`."
            )

    def check_samples(self, count: int, epochs: int = 1) -> None:
        """Raises ConfigError for too much work."""
        if count * epochs > self.samples:
            times = f" in {epochs} epochs" if epochs > 1 else ""
            raise ConfigError(f"this site's samples{times} are more than limits.samples in its file allows.")

    def check_reply(self, size: int) -> None:
        """Raises ConfigError for a reply of more bytes than this site sends."""
        if size > self.reply_bytes:
            raise ConfigError(
                f"a reply would have {size} bytes, more than limits.reply_bytes = {self.reply_bytes} in this site's file; "
                "lower model.lora.rank, or let model.lora.target match fewer modules."
            )


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in the block after this many seconds. If it does not end within `GRACE`, because it waits in code that
    Python cannot interrupt, the process ends. Without effect outside the main thread, which alone can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    handler = signal.signal(signal.SIGALRM, interrupt)
    earlier = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *earlier)
        signal.signal(signal.SIGALRM, handler)
        faulthandler.cancel_dump_traceback_later()
