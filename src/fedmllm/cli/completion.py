"""What the shell completes: experiment files, run directories and settings. Where nothing is offered, it completes files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedmllm.api import QUICKSTART


def experiment_files(incomplete: str) -> list[str]:
    """Files that end in .toml, and the experiment that ships with the package."""
    names = [QUICKSTART] if QUICKSTART.startswith(incomplete) else []
    return names + sorted(path for path in _matching(incomplete) if path.endswith(".toml") and Path(path).is_file())


def run_folders(incomplete: str) -> list[str]:
    """Folders of runs and sweeps; before anything is typed, those in runs/ as well."""
    paths = [*_matching(incomplete), *(_matching("runs/") if not incomplete else ())]
    written = ("meta.json", "result.json", "sweep.json")
    return sorted(path for path in paths if any((Path(path) / name).is_file() for name in written))


def setting_keys(incomplete: str) -> list[str]:
    """The keys of experiment files, as `--set` takes them; those of a table only once its name is typed."""
    from pydantic import BaseModel

    from fedmllm.config import Experiment

    keys: list[str] = []
    for key, field in Experiment.model_fields.items():
        kind = field.annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            keys.append(f"{key}=")
        elif incomplete.startswith(f"{key}."):
            keys += [f"{key}.{inner}=" for inner in kind.model_fields]
        else:
            keys.append(f"{key}.")
    return [key for key in keys if key.startswith(incomplete)]


def _matching(incomplete: str) -> Iterator[str]:
    """The paths that begin with this text, spelled as it is."""
    folder, slash, beginning = incomplete.rpartition("/")
    try:
        for path in Path(folder + slash or ".").iterdir():
            if path.name.startswith(beginning):
                yield f"{folder}{slash}{path.name}"
    except OSError:
        return
