"""The tables of parts in the documentation are those that the registries give."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def load_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["docs_tables"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_tables()
SOURCES = tables.load_sources()


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_the_tables_are_fresh(page: Path) -> None:
    assert page.read_text() == tables.refreshed(page, SOURCES), f"the tables in docs/{page.name} are stale; run `make docs`"


@pytest.mark.parametrize("name", sorted(SOURCES.registries))
def test_every_part_is_described_on_its_page(name: str) -> None:
    page = (DOCS / tables.PAGES[name]).read_text()
    assert [part for part in SOURCES.registries[name].names() if f"`{part}`" not in page and part != "none"] == []


def test_every_model_family_is_described() -> None:
    assert [name for name in SOURCES.families.names() if f"`{name}`" not in (DOCS / "models.md").read_text()] == []


def test_the_inventory_names_every_part() -> None:
    rows = (DOCS / "parts.md").read_text().splitlines()
    for registry in SOURCES.registries.values():
        (row,) = [row for row in rows if row.startswith(f"| `{registry.kind}` |")]
        assert [name for name in registry.names() if f"`{name}`" not in row] == []


def test_an_option_is_shown_as_in_an_experiment_file() -> None:
    rows = tables.generate("tasks", SOURCES).splitlines()
    (slake,) = [row for row in rows if row.startswith("| `slake` |")]
    assert slake.endswith('| `data_dir` (required), `language = "en"`, `test_set = "test"` |')
    (jsonl,) = [row for row in rows if row.startswith("| `jsonl` |")]
    assert jsonl.endswith('| `test` (required), `train` (required), `lettered = true`, `metric = "accuracy"`, `positive` |')


def test_every_table_of_the_experiment_file_has_its_keys_on_the_page() -> None:
    """Tables whose every key but `name` is an option of the named part are described by the table of parts."""
    page = (DOCS / "experiments.md").read_text()
    own = [table for table, schema in SOURCES.schema["properties"].items() if not schema.get("$ref", "").endswith("/Named")]
    shown = set(re.findall(r"<!-- table: keys\.(\w+) -->", page))
    assert shown == {table for table in own if "$ref" in SOURCES.schema["properties"][table]} | {"top"}
    assert [
        table for table in SOURCES.schema["properties"] if f"`[{table}]`" not in page and table in own and table in shown
    ] == []


def test_a_key_is_shown_with_type_default_and_meaning() -> None:
    rows = {row.split("`")[1]: row for row in tables.generate("keys.train", SOURCES).splitlines()[2:]}
    assert rows["cohort"].startswith(
        '| `cohort` | integer ≥ 1 or `"auto"` | `"auto"` | The number of clients trained in one pass'
    )
    assert rows["rounds"].startswith("| `rounds` | integer ≥ 1 | `10` |")
    assert rows["deadline"].startswith("| `deadline` | number > 0 | – | Simulated seconds")
    keys = [row.split("`")[1] for row in tables.generate("keys.model", SOURCES).splitlines()[2:]]
    assert {"name", "adapter.kind", "lora.rank", "quantize"} <= set(keys)
    assert "| `name` | string | required |" in tables.generate("keys.task", SOURCES)
    assert '| `name` | string | `"aligned"` |' in tables.generate("keys.scenario", SOURCES)


def test_every_key_has_a_description() -> None:
    models = [*SOURCES.schema["$defs"].items(), ("Experiment", SOURCES.schema)]
    keys = [(model, key, schema) for model, tables_ in models for key, schema in tables_["properties"].items()]
    assert [(model, key) for model, key, schema in keys if "$ref" not in schema and "description" not in schema] == []


def test_every_page_is_in_the_navigation_once() -> None:
    nav = (DOCS.parent / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\nplugins:")[0]
    named = re.findall(r"([\w-]+\.md)$", nav, re.MULTILINE)
    generated = {"changelog.md", "contributing.md", "security.md"}
    assert sorted(named) == sorted({page.name for page in tables.pages()} | generated)


def test_every_extra_is_on_the_page_about_installing() -> None:
    extras = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = set(re.findall(r"^\| `(\w+)` \|", (DOCS / "install.md").read_text(), re.MULTILINE))
    assert rows == extras.keys() - {"dev", "docs", "bench"}


def test_every_command_is_on_the_page_with_its_options() -> None:
    page = tables.generate("commands", SOURCES)
    for name, command in SOURCES.command.commands.items():
        chapter = page.partition(f"## fedmllm {name}\n")[2].partition("\n## ")[0]
        words = {word for parameter in command.params for word in parameter.opts if word.startswith("-")}
        assert [word for word in sorted(words) if f"`{word}`" not in chapter] == [], name
    assert "| `KIND` | zero-shot \\| local \\| centralised | required | – |" in page
    assert "| `--days` | INTEGER RANGE | `825` |" in page


def test_algorithms_have_their_traffic_and_properties() -> None:
    rows = {row.split("`")[1]: row for row in tables.generate("algorithms", SOURCES).splitlines()[2:]}
    assert rows["fedsa-lora"].endswith("| adapter (A) | adapter (A) | averages, personal, needs LoRA |")
    assert rows["scaffold"].endswith("| adapter, control | adapter, control | averages |")
    assert rows["fednova"].endswith("| adapter | adapter, normaliser | – |")


def test_a_pipe_does_not_end_a_cell() -> None:
    assert tables.table(["a", "b"], [["x|y", ""]]) == "| a | b |\n|---|---|\n| x\\|y | – |"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n<!-- table: tsaks -->\n<!-- end -->\n", "there is no table 'tsaks'"),
        ("\n<!-- table: tasks -->\n| a |\n", "close each"),
        ("\n<!-- table: tasks -->\n\n<!-- table: scenarios -->\n<!-- end -->\n", "close each"),
    ],
)
def test_a_wrong_marker_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        tables.refreshed(tmp_path / "page.md", SOURCES)


def test_text_around_a_table_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- table: prompts -->\nold\n<!-- end -->\n\nafter\n")
    fresh = tables.refreshed(page, SOURCES)
    assert fresh.startswith("before\n\n<!-- table: prompts -->\n\n| name |")
    assert fresh.endswith("|\n\n<!-- end -->\n\nafter\n")
    page.write_text(fresh)
    assert tables.refreshed(page, SOURCES) == fresh
