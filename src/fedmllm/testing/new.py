"""The files that `fedmllm new` writes: a part of one's own that works, and its test. They are those of docs/extending.md."""

from __future__ import annotations

import keyword
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from fedmllm.errors import ConfigError, RunError
from fedmllm.experiment.parts import REGISTRIES
from fedmllm.storage.atomic import check_folder, write_atomically

NewKind = Literal["algorithm", "scenario", "task"]


class Template(NamedTuple):
    """The name of the part in the template, which is replaced, and options with which it is checked."""

    name: str
    options: str
    settings: str
    """What `fedmllm run` must be told to use the part beside its name."""


TEMPLATES: dict[NewKind, Template] = {
    "algorithm": Template("trimmed-mean", "share=0.4", "--set train.clients_per_round=4"),
    "scenario": Template("uneven-rates", "rates=[0.0, 0.3, 0.9]", '--set "scenario.rates=[0.0, 0.3, 0.9]"'),
    "task": Template("color-squares", "train=30, test=30", ""),
}


def module_of(name: str) -> str:
    """The name of the Python module of a part."""
    return name.replace("-", "_")


def files_of(kind: NewKind, name: str) -> dict[str, str]:
    """file -> its content, for a new part of this name, which is written with hyphens."""
    template, module = TEMPLATES[kind], module_of(name)
    code = (Path(__file__).parent / "templates" / f"{module_of(template.name)}.py").read_text(encoding="utf-8")
    code = code.replace(module_of(template.name), module).replace(template.name, name)
    test = (
        f"import {module}\nfrom fedmllm.testing import check_{kind}\n\n\n"
        f'def test_{module}():\n    check_{kind}("{name}", {template.options})\n'
    )
    return {f"{module}.py": code, f"test_{module}.py": test}


def write_part(kind: NewKind, name: str, folder: Path) -> list[str]:
    """Write a new part and its test into the folder; the lines that say how to use it. Raises ConfigError if the name cannot be
    used, RunError if a file exists or the folder cannot be written to."""
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise ConfigError(f"{name!r} cannot name a part; use small letters, digits and hyphens, as in my-{kind}.")
    module, name = module_of(name), name.replace("_", "-")
    files = files_of(kind, name)
    for file in files:
        if (folder / file).exists():
            raise RunError(f"{folder / file} exists already; choose another name.")
    if name in REGISTRIES[kind].names():
        raise ConfigError(f"{kind}.name: {name!r} exists already; choose another name.")
    if find_spec(module) is not None:
        raise ConfigError(
            f"{module!r} is the name of an installed Python module, which the file would hide; choose another name."
        )
    check_folder(folder)
    for file, content in files.items():
        write_atomically(folder / file, content.encode())
    command = f"fedmllm run quickstart --plugin {module}.py --set {kind}.name={name} {TEMPLATES[kind].settings}".rstrip()
    return [
        f"{folder / f'{module}.py'} and {folder / f'test_{module}.py'} are written. Next:",
        f"  pytest test_{module}.py",
        f"  {command}",
    ]
