"""What the README and the guides tell a user to type must work."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import pytest
import typer.main

from fedmllm import config
from fedmllm.algorithms import algorithms, compressions, regularizations
from fedmllm.cli.app import app
from fedmllm.config import Experiment
from fedmllm.data.partitions import partitions
from fedmllm.data.prompts import prompts
from fedmllm.data.scenarios import scenarios
from fedmllm.data.tasks import tasks
from fedmllm.experiment.parts import build, options_of
from fedmllm.experiment.sweep import plan_sweep
from fedmllm.secure.settings import secures

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDES = sorted((ROOT / "docs").glob("*.md"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_its_whole_experiment_is_one(tmp_path: Path) -> None:
    (shown,) = blocks(README, "toml")
    experiment = config.validate(tomllib.loads(shown))
    assert len(build(experiment).prepare().train) == 1500


def test_its_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^make ([a-z-]+)", "\n".join(blocks(README, "sh")), re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= set(targets)
    assert {"demo", "test", "lint", "bench", "docs"} <= set(targets)


def commands() -> list[str]:
    lines = [line for block in blocks(README, "sh") for line in block.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith("fedmllm ")]


@pytest.mark.parametrize("line", commands())
def test_its_commands_parse(line: str) -> None:
    """Each command exists and takes these options; the experiment file and the settings it names are good."""
    words = line.split()[1:]
    command = typer.main.get_command(app)
    context = command.make_context("fedmllm", words[:1], resilient_parsing=True)
    sub = command.get_command(context, words[0])  # type: ignore[attr-defined]
    parsed = sub.make_context(words[0], words[1:], parent=context)
    if "file" in parsed.params:
        file, overrides = ROOT / parsed.params["file"], parsed.params["overrides"] or []
        if words[0] == "sweep":
            assert plan_sweep(file, overrides)[1]
            return
        config.validate(config.apply_overrides(config.read(file), overrides, options_of)[0])


@pytest.mark.parametrize(
    "file",
    [p for p in sorted((ROOT / "experiments").glob("*.toml")) if not p.name.endswith(".sweep.toml")],
    ids=lambda p: p.stem,
)
def test_every_shipped_experiment_checks(file: Path) -> None:
    raw, notes = config.apply_overrides(config.read(file), [], options_of)
    assert notes == []
    assert build(config.validate(raw, str(file))).prepare().train


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").rglob("*.sweep.toml")), ids=lambda p: p.name)
def test_every_shipped_sweep_checks(file: Path) -> None:
    assert plan_sweep(file)[1]


def test_the_guides_sweep_is_one(tmp_path: Path) -> None:
    (shown,) = blocks((ROOT / "docs" / "sweeps.md").read_text(), "toml")
    (tmp_path / "quickstart.toml").write_text((ROOT / "experiments" / "quickstart.toml").read_text())
    (tmp_path / "grid.toml").write_text(shown)
    assert len(plan_sweep(tmp_path / "grid.toml")[1]) == 2 * 3 * 3


def test_its_table_names_every_part() -> None:
    for registry in (tasks, partitions, scenarios, prompts, algorithms, regularizations, compressions, secures):
        row = next(line for line in README.splitlines() if line.startswith(f"| `{registry.kind}` |"))
        assert [name for name in registry.names() if f"`{name}`" not in row] == []


@pytest.mark.parametrize("name", [*algorithms.names(), *regularizations.names(), *compressions.names()])
def test_the_guide_to_algorithms_names_every_one(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "algorithms.md").read_text() or name == "none"


def test_every_algorithm_file_is_in_the_papers() -> None:
    papers = (ROOT / "docs" / "papers.md").read_text()
    registered = {Path(inspect.getfile(algorithms.factory(name))).name for name in algorithms.names()}
    registered |= {Path(inspect.getfile(regularizations.factory(name))).name for name in ("adaptive", "fedprox")}
    assert [file for file in sorted(registered) if f"`algorithms/{file}`" not in papers] == []


def test_the_guide_names_every_key() -> None:
    guide = (ROOT / "docs" / "experiments.md").read_text()
    for table, field in Experiment.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        for key in (
            inner
            if table not in ("scenario", "prompt", "algorithm", "regularization", "compression", "secure", "fleet")
            else ()
        ):
            assert f"`{key}`" in guide or f"`{key}." in guide, f"[{table}] {key} is not in docs/experiments.md"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_its_figures_of_the_benchmark_are_those_of_the_results() -> None:
    results = (ROOT / "docs" / "results.md").read_text()
    shown = [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith("| `") and line.count("|") == 9]
    names = [re.findall(r"`(.+)`", row[0])[0] for row in shown]
    assert names == ["qa", "pocket-memes", "openmoji"]
    for name, (_, untrained, alone, *best, pooled) in zip(names, shown, strict=True):
        chapter = results.partition(f"## offline-{name}\n")[2].partition("\n## ")[0]
        rows = [line.strip("| ").split(" | ") for line in chapter.splitlines() if line.startswith("|")]
        averages = {row[0]: row[-1] for row in reversed(rows) if row[0] in ("zero-shot", "local", "centralised")}
        assert [averages[kind] for kind in ("zero-shot", "local", "centralised")] == [untrained, alone, pooled]
        scenarios = {row[0].split()[0]: row[5] for row in rows if re.fullmatch(r"[a-z]+ \(\d+\)", row[0])}
        assert [scenarios.get(scenario, "–") for scenario in ("aligned", "missing", "cross", "hybrid")] == best, name
