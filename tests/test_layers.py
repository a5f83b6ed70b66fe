"""Imports go down only. A new module at the top of the package needs a line in `MAY_IMPORT`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fedmllm

ROOT = Path(fedmllm.__file__).parent

BOTTOM = {"errors", "tensors", "rng", "registry", "config"}
MEASURES = {"evaluation.metrics", "evaluation.intervals", "evaluation.comparing"}
MODELS = BOTTOM | MEASURES | {"data", "algorithms", "models"}
FLEETS = MODELS | {"training", "evaluation", "federation", "fleets", "secure"}
COMMANDS = {"store", "archive", "experiment", "bench", "provenance", "runs", "reevaluation", "sweep", "report"}
ALL = FLEETS | COMMANDS | {"progress", "printing", "launch", "cli", "cli_list", "cli_pack", "__init__", "secure.fleet"}

# part -> what else of the package it may import; everything may import itself.
MAY_IMPORT = {
    "__init__": set(),
    "errors": set(),
    "tensors": set(),
    "rng": set(),
    "registry": {"errors"},
    "config": {"errors", "registry"},
    "progress": set(),
    "printing": {"store"},
    "launch": set(),
    "store": {"errors", "tensors"},
    "archive": {"errors", "store"},
    "report": MEASURES | {"errors", "store"},
    "data": BOTTOM,
    "algorithms": BOTTOM,
    "evaluation.metrics": BOTTOM,
    "evaluation.intervals": BOTTOM,
    "evaluation.comparing": BOTTOM | {"evaluation.intervals"},
    "models": BOTTOM | {"data", "algorithms"},
    "training": MODELS,
    "evaluation": MODELS,
    "federation": {"algorithms", "config", "tensors", "rng"},
    "secure": BOTTOM | {"algorithms"},
    "secure.fleet": BOTTOM | {"algorithms", "federation", "fleets", "secure"},
    "fleets": MODELS | {"training", "evaluation", "federation", "secure"},
    "experiment": FLEETS,
    "bench": FLEETS | {"experiment"},
    "provenance": FLEETS | {"experiment", "bench"},
    "runs": FLEETS | {"store", "experiment", "bench", "provenance", "secure.fleet"},
    "reevaluation": FLEETS | {"store", "experiment", "bench"},
    "sweep": FLEETS | {"store", "experiment", "launch"},
    "remote": FLEETS | {"store", "experiment", "bench", "runs", "sweep", "progress", "launch"},
    "cli_list": {"printing", "registry", "algorithms", "data", "evaluation", "fleets", "models", "secure"},
    "cli_pack": {"archive", "printing"},
    "cli_remote": ALL - {"cli", "cli_list", "cli_pack"} | {"remote"},
    "cli": ALL | {"remote", "cli_remote"},
    "__main__": {"cli"},
}  # fmt: skip

HEAVY = {"torch", "transformers", "peft"}
NO_LIBRARY = {
    "errors": HEAVY, "rng": HEAVY, "registry": HEAVY, "config": HEAVY, "store": HEAVY, "report": HEAVY, "data": HEAVY,
    "evaluation.metrics": HEAVY, "evaluation.intervals": HEAVY, "evaluation.comparing": HEAVY, "federation": HEAVY,
    "archive": HEAVY, "tensors": {"transformers", "peft"}, "algorithms": {"transformers", "peft"},
}  # fmt: skip


def imported(source: str) -> set[str]:
    """Dotted names of all that a file imports, wherever in it: `from a import b` is `a.b`, be `b` a module or not."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they go"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(dotted: str) -> str | None:
    """The part of the package that `fedmllm.…` belongs to; None where no line of `MAY_IMPORT` covers it."""
    inner = dotted.removeprefix("fedmllm").removeprefix(".")
    fitting = [part for part in MAY_IMPORT if inner == part or inner.startswith(f"{part}.")]
    if fitting:
        return max(fitting, key=len)
    return "__init__" if inner in ("", "__version__") else None


def violations(name: str, source: str) -> list[str]:
    """What is wrong with the imports of the module `name`, such as "fedmllm.data.samples"."""
    part = part_of(name)
    if part is None:
        return [f"{name} has no layer"]
    found = []
    for target in sorted(imported(source)):
        library = target.partition(".")[0]
        if library != "fedmllm":
            if library in NO_LIBRARY.get(part, set()):
                found.append(f"{name} imports {library}")
            continue
        to = part_of(target)
        if to is None:
            found.append(f"{name} imports {target}, which has no layer")
        elif to not in MAY_IMPORT[part] | {part}:
            found.append(f"{name} imports {target}")
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fedmllm", *(parts[:-1] if parts[-1] == "__init__" else parts)))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=module_name)
def test_imports_go_down_only(path: Path) -> None:
    assert violations(module_name(path), path.read_text(encoding="utf-8")) == []


def test_no_two_parts_may_import_each_other() -> None:
    def below(part: str, path: tuple[str, ...] = ()) -> None:
        assert part not in path, f"a circle: {' → '.join((*path, part))}"
        for lower in MAY_IMPORT[part] - {part}:
            below(lower, (*path, part))

    for part in MAY_IMPORT:
        below(part)


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("fedmllm.algorithms.new", "import torch\nfrom fedmllm.tensors import add", []),
        ("fedmllm.algorithms.new", "from fedmllm.models.mllm import MLLM", ["imports fedmllm.models.mllm.MLLM"]),
        ("fedmllm.algorithms.new", "from fedmllm import data", ["imports fedmllm.data"]),
        ("fedmllm.algorithms.new", "import peft", ["imports peft"]),
        ("fedmllm.data.tasks.new", "def load():\n    import torch.nn", ["imports torch"]),
        ("fedmllm.data.tasks.new", "from torch import nn", ["imports torch"]),
        ("fedmllm.data.tasks.new", "from fedmllm.storage.atomic import write_atomically", []),
        ("fedmllm.evaluation.metrics", "import fedmllm.models.mllm", ["imports fedmllm.models.mllm"]),
        ("fedmllm.evaluation.metrics", "from fedmllm.evaluation.evaluate import x", ["imports fedmllm.evaluation.evaluate.x"]),
        ("fedmllm.evaluation.evaluate", "from fedmllm.evaluation import metrics", []),
        ("fedmllm.federation", "from fedmllm.models import mllm", ["imports fedmllm.models.mllm"]),
        ("fedmllm.report.html", "from fedmllm.tensors import add", ["imports fedmllm.tensors.add"]),
        ("fedmllm.rng", "from fedmllm import __version__", ["imports fedmllm.__version__"]),
        ("fedmllm.data.samples", "from fedmllm.novelty import x", ["imports fedmllm.novelty.x, which has no layer"]),
        ("fedmllm.novelty", "", ["has no layer"]),
    ],
)
def test_the_rule_catches_what_it_should(name: str, source: str, expected: list[str]) -> None:
    assert violations(name, source) == [f"{name} {what}" for what in expected]
