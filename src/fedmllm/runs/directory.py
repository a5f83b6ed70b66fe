"""Which directory a run writes to."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from fedmllm.config import Experiment, read, validate
from fedmllm.errors import RunError, UserError
from fedmllm.experiment.parts import with_defaults
from fedmllm.kinds import RunKind
from fedmllm.storage.atomic import check_folder
from fedmllm.storage.run_dir import RunDir, new_run, unfinished


def choose_directory(config: Experiment, kind: RunKind, out: Path | None, resume: bool) -> RunDir:
    """The directory to run in: `out`, else a new one in runs/; with `resume` that of the latest incomplete run.

    A damaged run is passed over if it is a neighbour, and the directory's `notes` say so. Raises RunError if `out` holds
    something else, or a run that was not asked to resume, or cannot be written to.
    """
    if out is None:
        check_folder(Path("runs"))
        stem = f"{config.name}-{kind}-seed{config.seed}"
        notes: list[str] = []
        interrupted = unfinished(Path("runs"), stem, config.digest(), notes) if resume else None
        run = interrupted or new_run(Path("runs"), stem)
        run.notes += notes
        return run
    run = RunDir(out)
    if resume and run.complete:
        result = run.result()
        if result.get("config_digest") != config.digest() or result.get("kind") != kind:
            raise another_run(run, config, result.get("kind") == kind)
        return run
    check_folder(out)
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty; give another --out, or --resume to continue the run in it.")
    return run


def another_run(run: RunDir, config: Experiment, same_kind: bool) -> RunError:
    """Why the run in the directory cannot be continued: it is another experiment's, or an earlier version's of this one."""
    with suppress(UserError):
        if same_kind and with_defaults(validate(read(run.config))).digest() == config.digest():
            return RunError(
                f"{run.path} was begun by an earlier version of fedmllm, whose defaults were others; finish it with that "
                "version, or give another --out."
            )
    return RunError(f"{run.path} holds another experiment's run; give another --out.")
