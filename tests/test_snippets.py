"""What the README and the pages show is executed: commands, Python and TOML, one page after another as a reader would.

A block that cannot be executed has a comment before it in the page's source, `<!-- not run: REASON -->`. Its commands are
still parsed.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli_w

from commands import COMMAND, call
from fedmllm import api, config
from fedmllm.data.tasks import easy_vqa
from fedmllm.experiment.parts import build
from fedmllm.experiment.sweep import plan_sweep
from fedmllm.remote.files import FederationTable, SiteTable
from fedmllm.remote.limits import Limits
from fedmllm.report import hypothesis_file
from helpers import HETEROGENEITY, apply_overrides, png
from made_runs import make_sweep

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("results", "log", "errors")
"""Generated pages, and the log of what was done at its time."""
PAGES = {path.stem: path for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if path.stem not in LEFT_OUT}
_BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
ELSEWHERE = {"extending": "test_extending.py", "api": "test_api.py"}
"""Pages that another test executes."""
_FILES = {"tutorial": "experiment.toml"}
"""Where a page says that a reader saves the TOML that it shows."""


class Block(NamedTuple):
    page: str
    language: str
    text: str
    reason: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command, without comments."""
        lines = [shlex.split(line, comments=True) for line in self.text.splitlines()]
        return [words for words in lines if words]


def blocks_of(page: str) -> list[Block]:
    return [Block(page, m["language"], m["text"], m["reason"]) for m in _BLOCK.finditer(PAGES[page].read_text())]


BLOCKS = [block for page in sorted(PAGES) for block in blocks_of(page)]
SHELL = ("sh", "bash")
COMMANDS = [(b.page, words) for b in BLOCKS if b.language in SHELL for words in b.commands if words[0] == "fedmllm"]
RUN = sorted({b.page for b in BLOCKS if b.language in (*SHELL, "python") and b.reason is None} - ELSEWHERE.keys())


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    marked = [block for block in BLOCKS if block.reason is not None]
    assert all(len(block.reason.split()) >= 3 for block in marked if block.reason)
    assert {block.language for block in marked} <= {*SHELL, "python"}
    assert len(marked) <= 16
    executed = [block for block in BLOCKS if block.language in (*SHELL, "python", "toml") and block.reason is None]
    assert len(executed) > 3 * len(marked)
    assert [page for page, path in PAGES.items() if "<!-- not run" in _BLOCK.sub("", path.read_text())] == [], (
        "no block follows"
    )


def test_every_block_names_its_language() -> None:
    known = {*SHELL, "python", "toml", "json", "ini", "mermaid", "text"}
    assert [(block.page, block.text.splitlines()[0]) for block in BLOCKS if block.language not in known] == []


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value[1:4])
)
def test_a_command_parses(page: str, words: list[str]) -> None:
    """It exists and takes these options; the settings and the experiment file that it names, if it is one of ours, are good."""
    context = COMMAND.make_context("fedmllm", words[1:2], resilient_parsing=True)
    command = COMMAND.get_command(context, words[1])  # type: ignore[attr-defined]
    assert command is not None, f"there is no command {words[1]}"
    parameters = command.make_context(words[1], words[2:], parent=context).params
    file, overrides = str(parameters.get("file")), parameters.get("overrides") or []
    path = api.experiment_file(file) if file == api.QUICKSTART else ROOT / file
    if file.endswith(".sweep.toml"):
        assert plan_sweep(path, overrides)[1]
    elif path.is_file() and not parameters.get("plugin"):
        config.validate(apply_overrides(config.read(path), overrides)[0])


def check_toml(table: dict[str, Any], folder: Path) -> None:
    """Raises if it is no federation file, site file, sweep, entry point, experiment, or part of one of these, and no file of
    hypotheses."""
    if "project" in table:
        assert all(group.startswith("fedmllm.") for group in table["project"]["entry-points"])
    elif "sites" in table:
        FederationTable.model_validate(table)
    elif "superlink" in table:
        SiteTable.model_validate(table)
    elif "limits" in table:
        Limits.model_validate(table["limits"])
    elif "hypotheses" in table:
        (folder / "hypotheses.toml").write_text(tomli_w.dumps(table))
        assert hypothesis_file.read(folder / "hypotheses.toml")
    elif "base" in table:
        shutil.copy(ROOT / "experiments" / table["base"], folder)
        (folder / "sweep.toml").write_text(tomli_w.dumps(table | ({} if "axes" in table else tomllib.loads(HETEROGENEITY))))
        assert plan_sweep(folder / "sweep.toml")[1]
    else:
        build(config.validate({"task": {"name": "easy-vqa"}} | table))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "toml" and b.page != "extending"], ids=lambda b: b.page)
def test_toml_is_valid(block: Block, tmp_path: Path) -> None:
    check_toml(tomllib.loads(block.text), tmp_path)


def small(text: str) -> str:
    """An experiment with fewer samples and rounds, of a shapes-qa with fewer questions."""
    text = text.replace('name = "shapes-qa"', 'name = "shapes-qa"\ntrain = 40\ntest = 20')
    for key, number in {"train_samples": 12, "test_samples": 6, "rounds": 1, "clients": 3}.items():
        text = re.sub(rf"\b{key} = \d+", f"{key} = {number}", text)
    return text


@pytest.fixture(scope="module")
def _few_questions() -> Iterator[None]:
    """easy-VQA with its first questions: most of the time of a small run would pass with reading all of them."""
    with pytest.MonkeyPatch.context() as patch:
        whole = easy_vqa._load
        patch.setattr(easy_vqa, "_load", lambda split: islice(whole(split), 120))
        yield


@pytest.fixture(scope="module")
def world(_few_questions: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader has: experiments, a picture, a finished run, and sweeps, which are made by hand."""
    folder = tmp_path_factory.mktemp("world")
    quickstart = small((ROOT / "experiments" / "quickstart.toml").read_text())
    (folder / "experiments").mkdir()
    for name in ("quickstart", "EXPERIMENT.toml", "experiments/quickstart.toml"):
        (folder / name).write_text(quickstart)
    shutil.copy(ROOT / "experiments" / "quickstart.sweep.toml", folder / "experiments")
    shown = [block.text for block in BLOCKS if block.page == "sweeps" and block.language == "toml"]
    for name, text in zip(("first-grid", "first-grid.hypotheses"), shown, strict=True):
        (folder / "experiments" / f"{name}.toml").write_text(text)
    for picture in ("photo.png", "meme.png"):
        (folder / picture).write_bytes(png())
    run = api.run(api.load(folder / "quickstart"), out=folder / "runs" / "quickstart-federated-seed0").path
    for name in ("my-run", "a", "b"):
        shutil.copytree(run, run.with_name(name))

    def hits(cell: Mapping[str, str], seed: int, pattern: str) -> float:
        return {"zero-shot": 0.5, "FedAvg": 0.7, "FedYogi": 0.6}[cell["method"]] + seed / 40

    axes = {"heterogeneity": ["aligned", "cross 3:7"], "method": ["zero-shot", "FedAvg", "FedYogi"]}
    for name in ("first-grid", "pilot", "offline-openmoji", "offline-pocket-memes", "offline-qa", "offline-pocket-memes-smoke"):
        index = make_sweep(folder / "runs" / name, axes, hits, kinds={"zero-shot": "zero-shot"}, seeds=(0, 1, 2)) / "sweep.json"
        index.write_text(index.read_text().replace('"name": "made"', f'"name": "{name}"'))
    return folder


@pytest.fixture
def reader(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, in which the page's commands run."""
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("page", RUN)
def test_a_page_runs(page: str, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for block in blocks_of(page):
        if block.reason is not None:
            continue
        if block.language == "python":
            exec(block.text, names)
        elif block.language == "toml" and page in _FILES:
            Path(_FILES[page]).write_text(small(block.text))
        elif block.language in SHELL:
            for words in block.commands:
                line = " ".join(words)
                if words[0] == "cd":
                    monkeypatch.chdir(words[1])
                elif words[0] == "make":
                    assert words[1] in targets
                else:
                    assert words[0] == "fedmllm", f"{page}: mark the block as not run, with the reason: {line}"
                    paths = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in words[1:]]
                    done = call(*chain.from_iterable(paths))
                    assert done.exit_code == 0, f"{page}: {line}\n{done.output}\n{done.exception!r}"
