"""What the README and the guides tell a user to type must work."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from fedmllm import config
from fedmllm.algorithms import algorithms
from fedmllm.experiment.parts import build
from fedmllm.experiment.sweep import plan_sweep
from helpers import apply_overrides

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BENCHMARK = (ROOT / "docs" / "benchmark.md").read_text()
GUIDES = sorted((ROOT / "docs").glob("*.md"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_its_whole_experiment_is_one(tmp_path: Path) -> None:
    (shown,) = blocks(README, "toml")
    data = build(config.validate(tomllib.loads(shown))).prepare()
    assert (len(data.train), len(data.test)) == (1500, 500)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_its_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^make ([a-z-]+)", "\n".join(blocks(README, "sh") + blocks(BENCHMARK, "sh")), re.MULTILINE)
    assert {"demo", "test", "results"} <= set(named) <= set(targets)
    assert {"demo", "test", "lint", "bench", "tables", "docs"} <= set(targets)


@pytest.mark.parametrize(
    "file",
    [p for p in sorted((ROOT / "experiments").glob("*.toml")) if not p.name.endswith(".sweep.toml")],
    ids=lambda p: p.stem,
)
def test_every_shipped_experiment_checks(file: Path) -> None:
    raw, notes = apply_overrides(config.read(file), [])
    assert notes == []
    assert build(config.validate(raw, str(file))).prepare().train


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").rglob("*.sweep.toml")), ids=lambda p: p.name)
def test_every_shipped_sweep_checks(file: Path) -> None:
    assert plan_sweep(file)[1]


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_names_its_source(name: str) -> None:
    """The paper's arXiv number, or where it appeared, in the line that `fedmllm list` and the documentation show."""
    assert re.search(r"\((\d{4}\.\d{5}|ICLR 2025|NeurIPS 2025)\)\.$", algorithms.describe(name))


def test_the_papers_name_files_that_exist() -> None:
    papers = (ROOT / "docs" / "papers.md").read_text()
    files = set(re.findall(r"`([a-z_0-9/]+\.py)`", papers))
    assert len(files) > 20
    assert [
        file for file in sorted(files) if not ((ROOT / "src" / "fedmllm" / file).is_file() or (ROOT / file).is_file())
    ] == []


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *GUIDES], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tests_that_a_page_names_exist() -> None:
    named = {name for page in GUIDES for name in re.findall(r"`(test_\w+\.py)::(test_\w+)`", page.read_text())}
    assert len(named) > 20
    tests = {file: (ROOT / "tests" / file).read_text() for file, _ in named}
    assert [name for name in sorted(named) if f"def {name[1]}(" not in tests[name[0]]] == []


def test_the_hashes_are_those_of_the_tested_versions() -> None:
    """`make hashes` keeps them so; the extras of developers are not in the file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    makefile = (ROOT / "Makefile").read_text()
    (extras,) = re.findall(r"^EXTRAS := (.*)$", makefile, re.MULTILINE)
    assert set(extras.split()) == project["optional-dependencies"].keys() - {"bench", "docs", "dev"}
    tested, hashed = (
        {
            re.sub(r"[-_.]+", "-", name).lower(): version
            for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
        }
        for text in ((ROOT / "requirements" / name).read_text() for name in ("constraints.txt", "hashes.txt"))
    )
    assert {name: hashed[name] for name in hashed.keys() & tested} == {name: tested[name] for name in hashed.keys() & tested}
    direct = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    assert direct <= hashed.keys()
    for requirement in re.split(r"\n(?=\w)", (ROOT / "requirements" / "hashes.txt").read_text())[1:]:
        assert "--hash=sha256:" in requirement
        assert "+" not in requirement.split()[0], "a local build"


def test_the_readme_counts_the_verdicts_of_the_results() -> None:
    (line,) = re.findall(r"^supported: \d+.*, refuted: .*", (ROOT / "docs" / "results.md").read_text(), re.M)
    counts = dict(re.findall(r"([a-z][a-z ]*): (\d+)", line))
    firm = re.findall(r"\((\d+) after Holm\)", line)
    answers = (
        r"Of (\d+) \[answers.*, (\d+) support the claim \((\d+) .*\), (\d+) refute it \((\d+)\), "
        r"(\d+) exclude an effect that matters, and (\d+) are undecided"
    )
    (told,) = re.findall(answers, README)
    total = str(sum(map(int, counts.values())))
    no_effect, undecided = counts["no effect"], counts["undecided"]
    assert told == (total, counts["supported"], firm[0], counts["refuted"], firm[1], no_effect, undecided)


def test_the_scores_of_the_benchmark_page_are_those_of_the_results() -> None:
    results = (ROOT / "docs" / "results.md").read_text()
    shown = [line.strip("| ").split(" | ") for line in BENCHMARK.splitlines() if line.startswith("| `")]
    names = [re.findall(r"`(.+)`", row[0])[0] for row in shown]
    assert names == ["qa", "pocket-memes", "pocket-qwen", "openmoji"]
    for name, (_, untrained, alone, *best, pooled) in zip(names, shown, strict=True):
        chapter = results.partition(f"## offline-{name}\n")[2].partition("\n## ")[0]
        head, _, *rows = [line.strip("| ").split(" | ") for line in chapter.splitlines() if line.startswith("|")]
        scores = {row[0].removesuffix(" †"): dict(zip(head, row, strict=False)) for row in rows}
        assert [scores[kind]["mean"] for kind in ("zero-shot", "local", "centralised")] == [untrained, alone, pooled]
        for start, shown_mean in zip(("α", "β", "I:T", "p"), best, strict=True):
            settings = [
                float(cell.split()[0]) for setting, cell in scores["FedAvg"].items() if setting.startswith(f"{start} =")
            ]
            expected = pytest.approx(sum(settings) / len(settings), abs=0.101) if settings else None  # of rounded scores
            assert (None if shown_mean == "–" else float(shown_mean)) == expected, (name, start)
