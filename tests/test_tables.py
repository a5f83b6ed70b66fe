"""Every table of the command line at 80 columns: no line is longer, and what names a row is whole and on one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from commands import call
from fedmllm.cli import list as listing
from fedmllm.cli.output import print_result, print_suites, print_table
from fedmllm.cli.tables import parts_that_fit
from fedmllm.report.planning import Plan, plan_table
from fedmllm.report.tables import metrics_table
from made_runs import make_run, make_sweep

AXES = {"setting": ["hybrid 0.3", "hybrid 0.7", "missing", "aligned"], "method": ["zero-shot", "FedAvg + FedProx", "SCAFFOLD"]}
NAMES = ["quickstart-federated-seed0", "quickstart-federated-seed1", "quickstart-zero-shot-seed0"]


@pytest.fixture(autouse=True)
def _eighty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def tables(text: str) -> list[str]:
    """The lines of tables with borders."""
    return [line for line in text.splitlines() if line and line[0] in "┏┃┡│└"]


def check(text: str, *names: str) -> None:
    """The names are in every part of a table that has a row for them."""
    lines = tables(text)
    assert lines
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    for name in names:
        assert sum(f" {name} " in line for line in lines) >= sum(line[0] == "┏" for line in lines), name


def test_runs_are_named_by_folder_and_seed() -> None:
    for seed, name in enumerate(NAMES):
        make_run(Path("runs") / name, {"both": 0.5, "image": 0.6, "text": 0.7}, seed=seed)
    paths = [f"runs/{name}" for name in NAMES]
    compared = call("compare", *paths).stdout
    check(compared, *NAMES)
    assert next(line.split()[3] for line in tables(compared) if f" {NAMES[1]} " in line) == "1"
    check(call("compare", *paths, "--baseline", paths[0]).stdout, *NAMES[1:2])
    make_run(Path("others") / NAMES[0], {"both": 0.5})
    check(call("compare", paths[0], f"others/{NAMES[0]}").stdout, paths[0], f"others/{NAMES[0]}")


@pytest.mark.parametrize("options", [[], ["--by-pattern"], ["--baseline", "zero-shot"]])
def test_a_grid_names_its_methods(options: list[str]) -> None:
    make_sweep(Path("grid"), AXES, lambda cell, seed, pattern: 0.5, kinds={"zero-shot": "zero-shot"}, seeds=[0, 1, 2])
    printed = call("compare", "grid", *options).stdout
    lines = tables(printed)
    assert max(map(len, lines)) <= 80
    for name in (*AXES["setting"], *AXES["method"]):
        assert any(f" {name} " in line for line in lines), name


def test_a_result_at_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs") / NAMES[0], {"both": 0.5, "image": 0.6, "text": 0.7})
    result: dict[str, Any] = json.loads((Path("runs") / NAMES[0] / "result.json").read_text())
    for values in result["metrics"].values():
        for metric in ("accuracy_closed", "accuracy_open", "token_f1_open"):
            values |= {metric: 0.5, f"{metric}_ci": [0.25, 0.75]}
        values |= {"accuracy_worst_decile": 0.25, "majority": 0.5, "chance": 0.25}
    print_result(result, Path("runs") / NAMES[0], as_json=False)
    printed = capsys.readouterr().out
    result_of_run, by_pattern = printed.split("by modality pattern")
    check(result_of_run, NAMES[0])
    check(by_pattern, "both", "image", "text")
    assert by_pattern.count("50.0 [25.0, 75.0]") == 9
    figures = {f"severity {n}": 0.5 for n in range(1, 6)} | {"robustness": 0.25, "clean samples": 17}
    rows = {"gaussian noise on the picture": figures, "another text": figures}
    print_suites({"corruption": {"tables": {"both": rows}, "unavailable": []}})
    check(capsys.readouterr().out, *rows)


def test_the_other_tables_at_eighty_columns(capsys: pytest.CaptureFixture[str], write_experiment: Callable[..., Path]) -> None:
    plans = [Plan(name, 12, 0.05, 1_000, 12_345.6) for name in AXES["method"]]
    print_table(plan_table(plans, "zero-shot", 0.01, 0.8))
    check(capsys.readouterr().out, *AXES["method"])
    print_table(metrics_table({"both": {"accuracy": 0.5, "accuracy_ci": [0, 1], "n": 3, "parse_failures": 0}}, "x" * 200))
    title, *lines = capsys.readouterr().out.split("┏", 1)
    assert title.replace("\n", "") == "x" * 200
    check("┏" + lines[0], "both")
    check(call("partition", write_experiment()).stdout, *map(str, range(4)))


def test_the_cells_of_a_sweep_at_eighty_columns() -> None:
    Path("base.toml").write_text('name = "base"\n[task]\nname = "easy-vqa"\n')
    cells = "".join(
        f'[[axes.cells]]\nname = "{name}"\nset = {{"train.lr" = {n}e-4}}\n' for n, name in enumerate(AXES["method"], 1)
    )
    Path("grid.toml").write_text(f'name = "grid"\nbase = "base.toml"\nreplicates = 2\n[[axes]]\nname = "method"\n{cells}')
    printed = call("sweep", "grid.toml", "--dry-run").stdout
    check(printed, *AXES["method"])
    assert sum("federated-" in line for line in tables(printed)) == 6


@pytest.mark.parametrize("kind", [listing.PartKinds.scenarios, listing.PartKinds.attacks, listing.PartKinds.models])
def test_lists_at_eighty_columns(kind: listing.PartKinds) -> None:
    lines = call("list", kind.value).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for part in listing.parts_of(kind):
        assert any(line.startswith(f" {part['name']} ") for line in lines)


TEXTS = st.text("ab -", min_size=0, max_size=60)


@hypothesis.settings(max_examples=40)
@given(st.data(), st.integers(10, 120))
def test_any_table_fits_and_loses_nothing(data: st.DataObject, width: int) -> None:
    count = data.draw(st.integers(1, 8))
    table, rows = Table(), data.draw(st.lists(st.lists(TEXTS, min_size=count, max_size=count), max_size=4))
    for _ in range(count):
        table.add_column(data.draw(TEXTS), justify=data.draw(st.sampled_from(["left", "right"])))
    for row in rows:
        table.add_row(*row)
    console = Console(width=width)
    parts = list(parts_that_fit(table, console))
    assert {column.header for part in parts for column in part.columns} == {column.header for column in table.columns}
    with console.capture() as printed:
        for part in parts:
            console.print(part)
    smallest = 1 + 4 * max(len(part.columns) for part in parts)
    assert max(map(len, printed.get().splitlines())) <= max(width, smallest)
    letters = sum(text.count("a") for row in rows for text in row[:1]) * len(parts)
    assert printed.get().count("a") >= letters
