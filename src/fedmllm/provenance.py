"""What made a run: versions, commit and machine, for `meta.json`, and the memory that it took."""

from __future__ import annotations

import platform
import resource
import secrets
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedmllm.bench import Bench
from fedmllm.config import Experiment
from fedmllm.experiment import Data


def _commit() -> str | None:
    """The git commit of the package's own checkout, where it runs from one."""
    folder = Path(__file__).parent
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
        inside = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() if asked.returncode == 0 and inside.returncode == 0 else None


def describe(config: Experiment, kind: str, data: Data, bench: Bench) -> dict[str, Any]:
    """`meta.json`: what made this run."""
    return {
        "kind": kind,
        "run_id": secrets.token_hex(8),
        "config_digest": config.digest(),
        "manifest_digest": data.manifest.digest(),
        "versions": {name: version(name) for name in ("fedmllm", "torch", "transformers", "peft", "numpy")}
        | {"python": platform.python_version()},
        "git_commit": _commit(),
        "hardware": {
            "platform": platform.platform(),
            "device": str(bench.model.backbone.device),
            "threads": torch.get_num_threads(),
            "precision": str(bench.model.backbone.dtype).removeprefix("torch."),
        },
        "caches_features": bench.model.caches,
    }


def peak_memory_mb() -> int:
    """The process's largest resident size, or the GPU's largest allocation where there is one."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
