"""Imports go down only. A new room at the top of the package needs a place in `FLOORS`."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fedmllm

ROOT = Path(fedmllm.__file__).parent

FLOORS = (
    {"errors", "rng", "tensors", "__version__"},
    {"registry", "storage"},
    {"config"},
    {"data", "algorithms"},
    {"federation", "models"},
    {"secure", "training", "evaluation"},
    {"fleets", "report", "testing"},
    {"experiment"},
    {"runs"},
    {"remote"},
    {"api"},
    {"cli"},
    {"__init__", "__main__"},
)
"""From the bottom. A room, which is a folder or a file, imports from itself and from floors below its own."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

HEAVY = {"torch", "transformers", "peft"}
FORBIDDEN = {
    "errors": HEAVY,
    "rng": HEAVY,
    "registry": HEAVY,
    "config": HEAVY,
    "data": HEAVY,
    "federation": HEAVY,
    "report": HEAVY,
    "tensors": {"transformers", "peft"},
    "storage": {"transformers", "peft"},
    "algorithms": {"transformers", "peft"},
}


def imported(source: str) -> set[str]:
    """Dotted names of everything that a file imports, anywhere in it; `from a import b` is `a.b`, module or not."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they go"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(dotted: str) -> str:
    """The room of `fedmllm.…`; the package itself is "__init__"."""
    return dotted.split(".")[1] if "." in dotted else "__init__"


def violations(name: str, source: str) -> list[str]:
    """What is wrong with the imports of the module `name`, such as "fedmllm.data.samples"."""
    room = room_of(name)
    if room not in FLOOR:
        return [f"{name} has no floor"]
    problems = []
    for target in sorted(imported(source)):
        library, to = target.partition(".")[0], room_of(target)
        if library != "fedmllm":
            if library in FORBIDDEN.get(room, set()):
                problems.append(f"{name} imports {library}")
        elif to not in FLOOR:
            problems.append(f"{name} imports {target}, which has no floor")
        elif to != room and FLOOR[to] >= FLOOR[room]:
            problems.append(f"{name} imports {target}")
    return problems


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fedmllm", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def sources() -> dict[str, str]:
    return {module_name(path): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


def test_imports_go_down_only() -> None:
    assert [problem for name, source in sources().items() for problem in violations(name, source)] == []


def test_no_modules_import_each_other() -> None:
    """Within a room as well, imports inside functions and for types included. Raises CycleError, which names the modules."""
    modules = sources()

    def module_of(dotted: str) -> str:
        while dotted and dotted not in modules:
            dotted = dotted.rpartition(".")[0]
        return dotted

    TopologicalSorter(
        {name: {module_of(target) for target in imported(source)} - {name, ""} for name, source in modules.items()}
    ).prepare()


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
        ("fedmllm.evaluation.metrics", "import fedmllm.training.local", ["imports fedmllm.training.local"]),
        ("fedmllm.evaluation.transfer", "from fedmllm.evaluation import metrics", []),
        ("fedmllm.federation", "from fedmllm.models import mllm", ["imports fedmllm.models.mllm"]),
        ("fedmllm.models.new", "from fedmllm.federation import federate", ["imports fedmllm.federation.federate"]),
        ("fedmllm.report.html", "from fedmllm.runs import result", ["imports fedmllm.runs.result"]),
        ("fedmllm.cli.new", "from fedmllm import __version__", []),
        ("fedmllm.cli.new", "import fedmllm", ["imports fedmllm"]),
        ("fedmllm", "from fedmllm.api import run", []),
        ("fedmllm.data.samples", "from fedmllm.novelty import x", ["imports fedmllm.novelty.x, which has no floor"]),
        ("fedmllm.novelty", "", ["has no floor"]),
    ],
)
def test_the_rule_catches_what_it_should(name: str, source: str, expected: list[str]) -> None:
    assert violations(name, source) == [f"{name} {what}" for what in expected]


# What a process imports

LIGHT = HEAVY | {"numpy", "pyarrow", "safetensors", "pydantic", "PIL"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import fedmllm", LIGHT | {"typer", "rich"}),
        ("import fedmllm; fedmllm.load; fedmllm.run", LIGHT | {"typer", "rich"}),
        ("import sys; sys.argv = ['fedmllm', '--help']; from fedmllm.cli.app import app; app(standalone_mode=False)", LIGHT),
        ("import fedmllm.cli.app, fedmllm.report.writeup, fedmllm.report.tables, fedmllm.storage.archive", HEAVY),
    ],
    ids=["package", "api", "help", "reading results"],
)
def test_only_what_needs_a_library_imports_it(code: str, absent: set[str]) -> None:
    script = f"{code}\nimport sys\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.split()) & absent == set()
