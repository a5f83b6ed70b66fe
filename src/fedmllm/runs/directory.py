"""Which directory a run writes to."""

from __future__ import annotations

from pathlib import Path

from fedmllm.config import Experiment
from fedmllm.errors import RunError
from fedmllm.kinds import RunKind
from fedmllm.storage.atomic import check_folder
from fedmllm.storage.run_dir import RunDir, new_run, unfinished


def choose_directory(config: Experiment, kind: RunKind, out: Path | None, resume: bool) -> RunDir:
    """The directory to run in: `out`, else a new one in runs/; with `resume` that of the latest incomplete run.

    Raises RunError if `out` holds something else, or a run that was not asked to resume, or cannot be written to.
    """
    if out is None:
        check_folder(Path("runs"))
        stem = f"{config.name}-{kind}-seed{config.seed}"
        interrupted = unfinished(Path("runs"), stem, config.digest()) if resume else None
        return interrupted or new_run(Path("runs"), stem)
    run = RunDir(out)
    if resume and run.complete:
        result = run.result()
        if result["config_digest"] != config.digest() or result["kind"] != kind:
            raise RunError(f"{out} holds another experiment's run; give another --out.")
        return run
    check_folder(out)
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty; give another --out, or --resume to continue the run in it.")
    return run
