"""Grids: what is run, what is skipped, what goes on, what is told of failures, and the tables made of them."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import layouts
from commands import call, forked, run
from federations import wait_for
from fedmllm.config import Experiment, read, validate
from fedmllm.experiment import sweep
from fedmllm.experiment.parts import build
from fedmllm.experiment.processes import Processes
from fedmllm.report.published import published, setting_of
from fedmllm.storage.lock import locked
from fedmllm.storage.run_dir import RunDir
from helpers import HETEROGENEITY, apply_overrides
from made_runs import make_sweep

Write = Callable[..., Path]
ROOT = Path(__file__).parents[1]
PAPER = sorted((ROOT / "experiments" / "paper").glob("*.sweep.toml"))

GRID = (
    HETEROGENEITY
    + """
[[axes]]
name = "method"
cells = [
    { name = "zero-shot", kind = "zero-shot" },
    { name = "FedYogi", set = { "algorithm.name" = "fedyogi" } },
]
"""
)

METHOD = """
[[axes]]
name = "method"
cells = [{ name = "FedYogi", set = { "algorithm.name" = "fedyogi" } }]
"""


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write_sweep(write_experiment: Write, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a sweep file over the small experiment; `text` holds its axes."""

    def write(text: str = GRID, head: str = "seeds = [0]", rounds: int = 1) -> Path:
        base = write_experiment(rounds=rounds)
        path = tmp_path / "grid.toml"
        path.write_text(f'name = "grid"\nbase = "{base.name}"\n{head}\n{text}')
        return path

    return write


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["id"] for row in rows]


def test_a_dry_run_prints_the_cells_and_makes_nothing(write_sweep: Write) -> None:
    file = write_sweep(head="seeds = [0, 1]")
    rows = run("sweep", file, "--dry-run")["cells"]
    assert [(tuple(r["axes"].values()), r["seed"], r["kind"]) for r in rows] == [
        (("α = 0.5", "zero-shot"), 0, "zero-shot"), (("α = 0.5", "zero-shot"), 1, "zero-shot"),
        (("α = 0.5", "FedYogi"), 0, "federated"), (("α = 0.5", "FedYogi"), 1, "federated"),
        (("β = 0.3", "zero-shot"), 0, "zero-shot"), (("β = 0.3", "zero-shot"), 1, "zero-shot"),
        (("β = 0.3", "FedYogi"), 0, "federated"), (("β = 0.3", "FedYogi"), 1, "federated"),
    ]  # fmt: skip
    assert {r["state"] for r in rows} == {"new"}
    assert len({r["id"] for r in rows if r["kind"] == "zero-shot"}) == 1, "zero-shot depends on neither axis nor seed"
    assert len({r["id"] for r in rows if r["kind"] == "federated"}) == 4
    shown = call("sweep", file, "--dry-run").stdout
    assert "8 cells, 5 distinct runs" in shown
    assert not Path("runs").exists()


def test_ids_follow_the_meaning_not_the_file(write_sweep: Write) -> None:
    before = ids(run("sweep", write_sweep(), "--dry-run")["cells"])
    reworded = (
        GRID.replace("FedYogi", "yogi")
        .replace('"scenario.rate" = 0.3', '"scenario.rate" = 0.30')
        .replace('"algorithm.name" = "fedyogi"', '"algorithm.name" = "fedyogi", "algorithm.tau" = 0.001')
    )
    assert ids(run("sweep", write_sweep(reworded), "--dry-run")["cells"]) == before
    other = ids(run("sweep", write_sweep(), "--dry-run", "--set", "train.lr=0.5")["cells"])
    assert other[0] == before[0], "zero-shot has no learning rate"
    assert not {other[1], other[3]} & set(before)


class Finished:
    """In place of a launcher: every run is complete at once."""

    def run(self, command: Sequence[str], file: Path) -> tuple[int, str]:
        (folder := Path(command[list(command).index("--out") + 1])).mkdir()
        (folder / "result.json").write_text("{}")
        return 0, ""

    def stop(self) -> None: ...


def test_only_the_named_cells_are_run(write_sweep: Write) -> None:
    """Names of one axis are alternatives, those of several axes must all hold; the index has every cell all the same."""
    file = write_sweep(head="seeds = [0, 1]")
    everything = run("sweep", file, "--dry-run")["cells"]
    one = run("sweep", file, "--dry-run", "--only", "FedYogi", "--only", "β = 0.3")["cells"]
    assert one == [row for row in everything if tuple(row["axes"].values()) == ("β = 0.3", "FedYogi")]
    both = run("sweep", file, "--dry-run", "--only", "β = 0.3", "--only", "α = 0.5")["cells"]
    assert both == everything
    plan, runs = sweep.plan_sweep(file)
    rows = sweep.Sweeper(plan, runs, Path("runs/grid"), lambda *step: None, ["FedYogi", "β = 0.3"]).run(1, Finished())
    assert ids([row for row in rows if row["state"] == "complete"]) == ids(one)
    assert ids(json.loads(Path("runs/grid/sweep.json").read_text())["cells"]) == ids(everything)
    refused = call("sweep", file, "--dry-run", "--only", "FedYog")
    assert refused.exit_code == 2
    assert "--only FedYog: the sweep grid has no cell of that name; did you mean 'FedYogi'?" in " ".join(refused.stderr.split())


def test_a_grid_is_run_once_and_compared(write_sweep: Write) -> None:
    aligned = next(line for line in GRID.splitlines() if "α = 0.5" in line)
    file = write_sweep(GRID.replace(aligned, ""), head="seeds = [0, 1]")
    done = run("sweep", file, "--jobs", 2)
    assert [row["state"] for row in done["cells"]] == ["complete"] * 4
    folder = Path(done["out"])
    assert folder == Path("runs/grid")
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("*/result.json")}
    assert len(stamps) == 3
    again = call("sweep", file)
    assert again.exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*/result.json")} == stamps, "what was complete ran again"
    grid = run("compare", folder)
    assert grid["axes"] == ["heterogeneity", "method"]
    yogi = next(row for row in grid["rows"] if row["axes"] == {"heterogeneity": "β = 0.3", "method": "FedYogi"})
    scores = [RunDir(folder / i).result()["metrics"]["both"]["accuracy"] for i in yogi["ids"]]
    assert yogi["scores"] == scores
    assert yogi["mean"] == pytest.approx(sum(scores) / 2)
    assert yogi["sd"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert grid["published"] == [], "nothing is published on this task"
    table = call("compare", folder).stdout
    assert "FedYogi" in table
    assert "β = 0.3" in table
    equal = run("run", folder / f"{yogi['ids'][0]}.toml", "--out", "alone")
    assert equal["metrics"] == RunDir(folder / yogi["ids"][0]).result()["metrics"]


def test_a_failed_cell_is_reported_at_the_end_and_the_others_run(write_sweep: Write) -> None:
    failing = '{ name = "FedYogi", set = { "algorithm.name" = "fedyogi", "train.max_length" = 3 } }'
    cells = f'cells = [{failing}, {{ name = "zero-shot", kind = "zero-shot" }}]'
    done = call("sweep", write_sweep(f'[[axes]]\nname = "method"\n{cells}'), "--json")
    assert done.exit_code == 1
    rows = json.loads(done.stdout)["cells"]
    assert [row["state"] for row in rows] == ["failed", "complete"]
    assert "exit status 2" in rows[0]["error"]
    assert "train.max_length = 3" in rows[0]["error"]
    assert done.stderr.count("failed: ") == 1
    assert "Traceback" not in done.output
    index = json.loads(Path("runs/grid/sweep.json").read_text())
    assert [row["state"] for row in index["cells"]] == [row["state"] for row in rows]
    table = call("compare", "runs/grid")
    assert table.exit_code == 0
    assert "–" in table.stdout


def test_a_cell_that_was_cut_short_goes_on(write_sweep: Write) -> None:
    """Its first rounds are those of the run that was killed: they are not done again."""
    file = write_sweep(METHOD, rounds=3)
    [[cell], folder] = sweep.plan_sweep(file)[1], Path("runs/grid")
    Path("cell.toml").write_text(cell.experiment.toml())
    expected = run("run", "cell.toml", "--out", folder / cell.id)
    (folder / cell.id / "result.json").unlink()
    rounds = (folder / cell.id / "rounds.jsonl").read_text()
    assert ids(run("sweep", file, "--dry-run")["cells"]) == [cell.id]
    assert run("sweep", file, "--dry-run")["cells"][0]["state"] == "cut short"
    assert run("sweep", file)["cells"][0]["state"] == "complete"
    assert (folder / cell.id / "rounds.jsonl").read_text() == rounds
    assert RunDir(folder / cell.id).result()["adapter_sha256"] == expected["adapter_sha256"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_its_runs_and_can_go_on(write_sweep: Write, number: signal.Signals) -> None:
    file = write_sweep(METHOD, rounds=500)
    with forked(Path("stderr"), "sweep", file) as process:
        wait_for(lambda: list(Path("runs/grid").glob("federated-*/checkpoint/server.safetensors")), 120)
        assert process.pid is not None
        os.kill(process.pid, number)  # to the parent alone
        process.join(60)
        assert process.exitcode == 130
    assert "Traceback" not in Path("stderr").read_text()
    states = {row["state"] for row in run("sweep", file, "--dry-run")["cells"]}
    assert "cut short" in states
    for folder in Path("runs/grid").glob("federated-*/"):
        with locked(folder / "run.lock", AssertionError(f"{folder} is still being written"), wait_seconds=5):
            pass


def test_a_killed_run_fails_alone(write_sweep: Write) -> None:
    """Of two at a time; what its process had begun stays there to go on with."""
    launcher = Processes(2)
    [other, one, *_] = sweep.plan_sweep(write_sweep(rounds=20_000))[1]
    status: dict[str, tuple[int, str]] = {}

    def launch(name: str, command: list[str], settings: Experiment) -> threading.Thread:
        file = Path(f"{name}.toml")
        file.write_text(settings.toml())
        run_it = lambda: status.update({name: launcher.run([*command, str(file), "--out", f"runs/{name}"], file)})  # noqa: E731
        thread = threading.Thread(target=run_it)
        thread.start()
        return thread

    threads = [launch("killed", ["run"], one.experiment)]
    wait_for(Path("runs/killed/rounds.jsonl").exists, 120)
    [child] = launcher._children
    threads.append(launch("other", ["baseline", "zero-shot"], other.experiment))
    child.kill()
    for thread in threads:
        thread.join(120)
    assert status["killed"][0] == 128 + signal.SIGKILL
    assert status["other"][0] == 0
    assert RunDir(Path("runs/other")).complete
    launcher.stop()
    assert launcher.run(["--help"], Path("none")) == (130, "interrupted")


def test_two_sweeps_do_not_share_a_folder(write_sweep: Write) -> None:
    planned = sweep.plan_sweep(write_sweep())
    with locked(Path("runs/grid/.lock"), RuntimeError()):
        done = call("sweep", write_sweep())
    assert done.exit_code == 2
    assert "another sweep is running there" in done.stderr
    assert planned


BAD = [
    ("axes = 3", "grid.toml: axes: "),
    ('axs = []\n', "axs: unknown key; did you mean 'axes'?"),
    ('[[axes]]\nname = "m"\ncells = [{ nam = "x" }]', "axes.0.cells.0.nam: unknown key; did you mean 'name'?"),
    ('[[axes]]\nname = "m"\ncells = [{ name = "x", set = { "algorithm.name" = "fedyogy" } }]',
     "the cell x: algorithm.name: there is no algorithm 'fedyogy'; did you mean 'fedyogi'?"),
    ('[[axes]]\nname = "m"\ncells = [{ name = "x", set = { "train.ruonds" = 1 } }]',
     "the cell x: train.ruonds: unknown key; did you mean 'rounds'?"),
    ('[[axes]]\nname = "m"\ncells = [{ name = "x", set = { "algorithm.name" = "flora", "model.adapter.kind" = "ia3" } }]',
     "the cell x: algorithm.name: 'flora' works on LoRA's factors"),
    ('[[axes]]\nname = "m"\ncells = [{ name = "x", kind = "zero-shot" }]\n'
     '[[axes]]\nname = "n"\ncells = [{ name = "y", kind = "local" }]',
     "the cell x · y: is of kinds ['local', 'zero-shot'] at once"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), BAD, ids=[s[:30] for _, s in BAD])
def test_a_bad_sweep_file_is_one_sentence_and_status_2(write_sweep: Write, text: str, sentence: str) -> None:
    done = call("sweep", write_sweep(text))
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert not Path("runs").exists()


def test_a_base_that_is_not_there(write_sweep: Write) -> None:
    file = write_sweep()
    file.write_text(file.read_text().replace('base = "small.toml"', 'base = "large.toml"'))
    done = call("sweep", file)
    assert done.exit_code == 2
    assert "large.toml: there is no such experiment file" in done.stderr


# The paper's grids


@pytest.mark.parametrize("file", PAPER, ids=lambda p: p.name.removesuffix(".sweep.toml"))
def test_the_papers_grids_are_whole(file: Path) -> None:
    _, planned = sweep.plan_sweep(file)
    settings = [setting_of(p.experiment.resolved()) for p in planned if p.kind == "federated"]
    full = list(published_settings())
    expected = full if file.name.startswith(("hateful", "crisis")) else full[6:]
    assert list(dict.fromkeys(settings)) == expected
    per_setting = {s: settings.count(s) for s in settings}
    strategies = 4 if expected == full else 2
    assert set(per_setting.values()) == {4 * strategies}
    assert {p.experiment.algorithm.name for p in planned if p.kind == "federated"} == {
        "fedyogi",
        "fedadam",
        "fedavgm",
        "fedadagrad",
    }
    kinds = {kind: len({p.id for p in planned if p.kind == kind}) for kind in ("zero-shot", "local")}
    prompts = strategies // 2
    assert kinds == {"zero-shot": prompts, "local": prompts * len(expected)}


LAYOUTS = {"hateful-memes": layouts.memes, "crisismmd": layouts.crisis, "vqa-rad": layouts.rad, "slake": layouts.slake}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_papers_files_read_the_published_layouts(name: str, tmp_path: Path) -> None:
    """Each base file with nothing changed but where the data lie and how many clients share the few samples."""
    for folder in (name, "medalpaca"):
        (tmp_path / folder).mkdir()
    LAYOUTS[name](tmp_path / name)
    layouts.alpaca(tmp_path / "medalpaca")
    moved = [f"task.data_dir={tmp_path / name}", "partition.clients=2"]
    if name in ("vqa-rad", "slake"):
        moved.append(f"task.companion.data_dir={tmp_path / 'medalpaca'}")
    raw, _ = apply_overrides(read(ROOT / "experiments" / "paper" / f"{name}.toml"), moved)
    data = build(validate(raw)).prepare()
    assert data.train
    assert data.test
    assert not any(s.id.startswith("medalpaca") for s in data.test)


def published_settings() -> list[str]:
    return list(published()["hateful-memes"]["fedyogi"])


def test_published_figures_are_the_papers() -> None:
    known = published()
    assert known["hateful-memes"]["fedavgm"]["α 0.5"] == 64.22
    assert known["hateful-memes"]["fedadagrad"]["p 0.7"] == 72.96
    assert known["crisismmd"]["fedavgm"]["I:T 7:3"] == 33.46
    assert known["crisismmd"]["fedyogi"]["β 0.4"] == 56.76
    assert known["vqa-rad"]["fedyogi"] == {"I:T 3:7": 58.98}
    assert {
        len(known[t][a]) for t in ("hateful-memes", "crisismmd") for a in ("fedyogi", "fedadam", "fedavgm", "fedadagrad")
    } == {12}


def test_published_figures_stand_beside_ours_and_are_marked() -> None:
    planned = sweep.plan_sweep(ROOT / "experiments" / "paper" / "hateful-memes.sweep.toml")[1]
    configs = {p.axes["heterogeneity"]: p.experiment.resolved() for p in planned if p.axes["method"] == "FedYogi"}
    axes = {"heterogeneity": ["α = 0.5", "β = 0.3"], "method": ["zero-shot", "FedYogi"]}
    folder = make_sweep(
        Path("runs/grid"),
        axes,
        lambda cell, seed, pattern: 0.5,
        kinds={"zero-shot": "zero-shot"},
        config=lambda cell: configs[cell["heterogeneity"]],
    )
    for file in folder.glob("*/result.json"):
        file.write_text(file.read_text().replace('"fedavg"', '"fedyogi"'))
    grid = run("compare", folder)
    figures = {p["heterogeneity"]: (p["algorithm"], p["percent"], p["metric"]) for p in grid["published"]}
    assert figures == {"α = 0.5": ("fedyogi", 74.32, "auc"), "β = 0.3": ("fedyogi", 76.58, "auc")}
    table = call("compare", folder).stdout
    assert "fedyogi, published (auc)" in table
    assert "other hardware" in table
    assert "74.3" in table
