"""`meta.json`: the versions, the commit and the machine behind a run, and the memory it takes."""

from __future__ import annotations

import resource
import secrets
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fedmllm.runs.machine import hardware, versions
from fedmllm.runs.session import Session


@cache
def _commit() -> str | None:
    """The git commit of the package's own checkout, if it runs from one."""
    git = {"cwd": Path(__file__).parent, "capture_output": True, "timeout": 10}
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], text=True, **git)  # type: ignore[call-overload]
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], **git)  # type: ignore[call-overload]
    except (OSError, subprocess.TimeoutExpired):
        return None
    return str(head.stdout).strip() if head.returncode == 0 and tracked.returncode == 0 else None


def describe(session: Session, kind: str) -> dict[str, Any]:
    """`meta.json`: versions, commit and machine behind the run."""
    return {
        "kind": kind,
        "run_id": secrets.token_hex(8),
        "config_digest": session.config.digest(),
        "manifest_digest": session.dataset.manifest.digest(),
        "content_digest": session.dataset.content_digest(),
        "versions": versions(),
        "git_commit": _commit(),
        "hardware": hardware(session.model),
        "caches_features": session.model.caches,
    }


def peak_memory_mb() -> int:
    """The largest resident size of the process, or the largest allocation on the GPU if there is one; the sum over several."""
    if torch.cuda.is_available():
        return round(sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) / 2**20)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
