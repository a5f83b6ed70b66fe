"""What the commands share: arguments, the experiment file, errors as exit statuses, and `--plugin`."""

from __future__ import annotations

import errno
import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from fedmllm.api import read_experiment
from fedmllm.cli import completion
from fedmllm.cli.output import OutputLost, fill_closed_streams, say
from fedmllm.errors import RunError, UserError, failure

if TYPE_CHECKING:
    from fedmllm.config import Experiment
    from fedmllm.progress import ProgressCallback, RunLog

P = ParamSpec("P")

File = Annotated[
    Path,
    typer.Argument(
        metavar="EXPERIMENT.toml",
        help='The experiment file, or "quickstart".',
        show_default=False,
        autocompletion=completion.experiment_files,
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False, autocompletion=completion.run_folders)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting; repeatable.",
        autocompletion=completion.setting_keys,
    ),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run directory; by default a new one in runs/.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue this experiment's latest run that is not complete.")]
TrustConfig = Annotated[
    bool,
    typer.Option("--trust-config", help="Take the model from a path, or run its code, if the run's config.toml says so."),
]
Verbose = Annotated[
    bool | None,
    typer.Option("--verbose/--quiet", "-v/-q", help="Show more: versions, device, files; or only the result and errors."),
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE.py", help="A file that registers parts of your own; repeatable."),
]


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Give a command `--plugin`, and turn its errors into exit statuses and messages for people."""

    @wraps(command)
    def run_guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        fill_closed_streams()
        try:
            plugins = kwargs.pop("plugin", None)
            assert isinstance(plugins, list | None)
            if plugins:
                from fedmllm.registry import load_plugin

                for path in plugins:
                    load_plugin(path)
            command(*args, **kwargs)
        except UserError as error:
            say(failure(error))
            raise typer.Exit(2) from None
        except OutputLost as error:
            say(f"note: standard output cannot be written ({error})" + (f", but {error.done}" if error.done else ""))
            raise typer.Exit(0 if error.closed else 1) from None
        except KeyboardInterrupt:
            say("interrupted: the same command with --resume continues after the last finished round")
            raise typer.Exit(130) from None
        except typer.Exit:
            raise
        except Exception as error:  # the boundary: any other error is a failed run, reported in one line
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # wherever the path was opened first
                say(f"error: {RunError(str(error))}; the name of a file or folder has at most 255 bytes.")
                raise typer.Exit(2) from None
            say(failure(error))
            if os.environ.get("FEDMLLM_DEBUG"):
                traceback.print_exc()
            raise typer.Exit(1) from None

    # typer reads a command's options from these two, and cannot evaluate annotations of another module.
    signature = inspect.signature(command, eval_str=True)
    plugin = inspect.Parameter("plugin", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Plugins)
    parameters = {**signature.parameters, "plugin": plugin}
    run_guarded.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
    run_guarded.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return run_guarded


@contextmanager
def showing(verbose: bool | None, *, models: bool = True) -> Iterator[RunLog]:
    """What a command calls while it works, whose bars end with the block. For a command that loads `models`, their libraries
    are imported first, which takes seconds."""
    from fedmllm.progress import RunLog
    from fedmllm.runs.progress import ProgressBars

    with ProgressBars(verbose) as bars:
        bars("starting", 0, 0, "")
        if models:
            _silence_libraries()
        yield RunLog(bars)


def load_experiment(file: Path, overrides: list[str] | None, progress: ProgressCallback) -> Experiment:
    """The experiment of a file, with overrides and all defaults. Raises ConfigError."""
    from fedmllm.config import parse_override

    experiment, notes = read_experiment(file, [parse_override(override) for override in overrides or []])
    for note in notes:
        progress("note", 0, 0, note)
    return experiment


def _silence_libraries() -> None:
    """transformers and its hub client have progress bars and advice of their own; those of the commands are enough."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
