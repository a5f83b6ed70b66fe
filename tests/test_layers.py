"""Imports go down only and never in circles. A new room at the top of the package needs a place in `FLOORS`."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fedmllm

ROOT = Path(fedmllm.__file__).parent

FLOORS = [
    {"errors", "kinds", "rng", "tensors"},
    {"progress"},
    {"registry", "storage"},
    {"config"},
    {"data", "algorithms"},
    {"models"},
    {"training", "evaluation", "privacy", "simulation"},
    {"federation", "report"},
    {"secure", "attacks"},
    {"fleets"},
    {"experiment"},
    {"runs"},
    {"remote", "testing"},
    {"api"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
"""Folders and modules at the top of the package, from the ground up; each imports what is on a lower floor."""
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

HEAVY = {"torch", "transformers", "peft"}
WITHOUT = {
    "errors": HEAVY, "kinds": HEAVY, "progress": HEAVY, "rng": HEAVY, "registry": HEAVY, "config": HEAVY,
    "data": HEAVY, "report": HEAVY,
    "tensors": {"transformers", "peft"}, "algorithms": {"transformers", "peft"}, "federation": HEAVY, "api": HEAVY,
    "cli": {"torch", "peft"},
}  # fmt: skip
"""Libraries that a room does not import, anywhere."""


def imported(source: str) -> set[str]:
    """Dotted names of everything that a file imports, at any place in it: `from a import b` is `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they go"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(dotted: str) -> str:
    """The room at the top of the package that `fedmllm.…` belongs to."""
    inner = dotted.removeprefix("fedmllm").removeprefix(".").partition(".")[0]
    return "__init__" if inner in ("", "__version__") else inner


def violations(name: str, source: str) -> list[str]:
    """What is wrong with the imports of the module `name`, such as "fedmllm.data.samples"."""
    room = room_of(name)
    if room not in LEVEL:
        return [f"{name} is on no floor"]
    problems = []
    for target in sorted(imported(source)):
        library = target.partition(".")[0]
        if library != "fedmllm":
            if library in WITHOUT.get(room, set()):
                problems.append(f"{name} imports {library}")
            continue
        other = room_of(target)
        if other not in LEVEL:
            problems.append(f"{name} imports {target}, which is on no floor")
        elif other != room and LEVEL[other] >= LEVEL[room]:
            problems.append(f"{name} imports {target}")
    return problems


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fedmllm", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


def circle(modules: dict[str, str]) -> list[str]:
    """The modules of an import circle, imports inside functions and under TYPE_CHECKING included; empty if there is none."""
    graph: dict[str, set[str]] = {}
    for name, source in modules.items():
        # `from fedmllm.data.samples import Sample` leads to the module, `from fedmllm.data import samples` to the submodule.
        targets = {t if t in modules else t.rpartition(".")[0] for t in imported(source) if t.startswith("fedmllm")}
        graph[name] = {target for target in targets if target in modules and target != name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_go_down_only() -> None:
    assert [problem for name, source in MODULES.items() for problem in violations(name, source)] == []


def test_no_import_circle() -> None:
    # A package's face may name its own parts, and `fedmllm` itself hands out what `api` has.
    assert circle({name: source for name, source in MODULES.items() if name != "fedmllm"}) == []


def test_every_room_is_there() -> None:
    top = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert top == LEVEL.keys()


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("fedmllm.algorithms.new", "import torch\nfrom fedmllm.tensors import add", []),
        ("fedmllm.algorithms.new", "from fedmllm.models.mllm import MLLM", ["imports fedmllm.models.mllm.MLLM"]),
        ("fedmllm.algorithms.new", "from fedmllm import data", ["imports fedmllm.data"]),
        ("fedmllm.algorithms.new", "import peft", ["imports peft"]),
        ("fedmllm.data.tasks.new", "def load():\n    import torch.nn", ["imports torch"]),
        ("fedmllm.data.tasks.new", "from fedmllm.storage.atomic import write_atomically", []),
        ("fedmllm.data.tasks.new", "from fedmllm.algorithms import Algorithm", ["imports fedmllm.algorithms.Algorithm"]),
        ("fedmllm.evaluation.new", "from fedmllm.evaluation import metrics", []),
        ("fedmllm.federation", "from fedmllm.fleets import base", ["imports fedmllm.fleets.base"]),
        ("fedmllm.report.html", "from fedmllm.runs.session import Session", ["imports fedmllm.runs.session.Session"]),
        ("fedmllm.rng", "from fedmllm import __version__", ["imports fedmllm.__version__"]),
        ("fedmllm.data.samples", "from fedmllm.novelty import x", ["imports fedmllm.novelty.x, which is on no floor"]),
        ("fedmllm.novelty", "", ["is on no floor"]),
    ],
)
def test_the_rule_catches_what_it_should(name: str, source: str, expected: list[str]) -> None:
    assert violations(name, source) == [f"{name} {what}" for what in expected]


def test_a_circle_is_found() -> None:
    modules = {"fedmllm.a": "def f():\n    from fedmllm.b import x", "fedmllm.b": "from fedmllm import c", "fedmllm.c": ""}
    assert circle(modules) == []
    assert set(circle(modules | {"fedmllm.c": "import fedmllm.a"})) == {"fedmllm.a", "fedmllm.b", "fedmllm.c"}


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
