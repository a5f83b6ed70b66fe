"""The shipped offline grids and studies are what their guide says."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from fedmllm.attacks.settings import attacks
from fedmllm.config import Experiment, read, validate
from fedmllm.experiment.parts import build, with_defaults
from fedmllm.experiment.sweep import PlannedRun, plan_sweep
from fedmllm.report.published import published, setting_of
from helpers import apply_overrides

OFFLINE = Path(__file__).parents[1] / "experiments" / "offline"
TASKS = ("openmoji", "pocket-memes", "qa")
PAPER = list(published()["hateful-memes"]["fedyogi"])
SEARCHED = (*TASKS, "pocket-qwen")
"""The cells of the search: the tasks, and pocket-memes for the second model."""
SEARCH = OFFLINE / "search.sweep.toml"
LARGE_SEARCH = OFFLINE / "pocket-large.search.sweep.toml"


def settings(task: str) -> list[str]:
    return PAPER if task != "qa" else PAPER[:3] + PAPER[6:]


@cache
def cells_of(file: Path) -> list[PlannedRun]:
    return plan_sweep(file)[1]


@pytest.mark.parametrize("task", TASKS)
def test_the_grid_has_the_papers_settings_and_all_baselines(task: str) -> None:
    """With replicates, the baselines have draws of their own at every setting."""
    planned = cells_of(OFFLINE / f"{task}.sweep.toml")
    cells = Counter(
        (setting_of(p.experiment.resolved()), p.experiment.algorithm.name) for p in planned if p.kind == "federated"
    )
    algorithms = {"fedavg", "fedavgm", "fedadagrad", "fedyogi", "fedadam", "lora-fair", "frlora"}
    many = 5 * len(settings(task))
    assert cells == {(s, a): 5 for s in settings(task) for a in algorithms}
    runs = Counter(kind for kind, _ in {(p.kind, p.id) for p in planned})
    assert runs == {"federated": len(algorithms) * many, "local": many, "centralised": many, "zero-shot": many}


@pytest.mark.parametrize("task", TASKS)
def test_the_ablation_varies_nothing_but_the_strategies(task: str) -> None:
    planned = cells_of(OFFLINE / f"{task}.ablation.sweep.toml")
    parts = ("prompt", "regularization")
    strategies = {p.axes["strategy"]: str([p.experiment.resolved()[part] for part in parts]) for p in planned}
    assert len(strategies) == len(set(strategies.values())) == (5 if task != "qa" else 3)
    cells = Counter((setting_of(p.experiment.resolved()), p.axes["strategy"]) for p in planned)
    replicates = {"openmoji": 12, "pocket-memes": 5, "qa": 9}[task]
    assert cells == {(s, a): replicates for s in settings(task) for a in strategies}
    kept = [{key: table for key, table in p.experiment.resolved().items() if key not in parts} for p in planned]
    assert set(Counter(map(str, kept)).values()) == {len(strategies)}, "each place and draw has all strategies"


def test_every_method_has_the_same_nine_trials_on_three_draws_of_held_out_data() -> None:
    searched = cells_of(SEARCH)
    assert {p.experiment.eval.split for p in searched} == {"validation"}
    assert len({p.id for p in searched}) == len(searched), "every trial is a run of its own"
    runs = Counter((p.axes["task"], p.kind, p.experiment.algorithm.name) for p in searched)
    assert set(runs.values()) == {9 * 3}
    assert {task for task, _, _ in runs} == set(SEARCHED)
    assert len(runs) == 16 * len(SEARCHED)


@pytest.mark.parametrize(("task", "search"), [*((task, SEARCH) for task in SEARCHED), ("pocket-large", LARGE_SEARCH)])
def test_the_winners_share_their_first_three_draws_with_the_search(task: str, search: Path) -> None:
    trials = {p.id for p in cells_of(search)}
    assert all((p.id in trials) == (p.replicate in (0, 1, 2)) for p in cells_of(OFFLINE / f"{task}.winners.sweep.toml"))


@pytest.mark.parametrize("task", SEARCHED)
def test_a_cell_of_the_grids_has_the_settings_of_one_of_its_methods_trials(task: str) -> None:
    def settings_of(planned: PlannedRun) -> tuple[str, str]:
        experiment = planned.experiment
        return planned.kind, str([experiment.algorithm, experiment.train, experiment.model])

    trials = {settings_of(p): p for p in cells_of(SEARCH) if p.axes["task"] == task}
    kinds = ("sweep",) if task == "pocket-qwen" else ("sweep", "others.sweep")
    grids = [p for kind in kinds for p in cells_of(OFFLINE / f"{task}.{kind}.toml")]
    trained = [p for p in grids if p.kind != "zero-shot"]
    assert {settings_of(p) for p in trained} <= trials.keys()
    assert not {p.experiment.task.draw for p in grids} & {p.experiment.task.draw for p in trials.values()}
    (of_ablation,) = {settings_of(p) for p in cells_of(OFFLINE / f"{task}.ablation.sweep.toml")}
    assert of_ablation in {settings_of(p) for p in trained if p.axes["method"] == "FedAvg"}


def test_the_large_model_has_the_trials_and_the_ablation_of_the_small_one() -> None:
    """But for the strength that grows with the gap. Its draws of the search are the others', and its rates are a trial's."""

    def cell(planned: PlannedRun) -> tuple[str, ...]:
        parts = ("seed", "task", "partition", "scenario", "prompt", "regularization", "eval")
        return tuple(str(planned.experiment.resolved()[part]) for part in parts)

    def rates(planned: PlannedRun) -> str:
        return str([planned.experiment.algorithm, planned.experiment.train])

    searched = cells_of(LARGE_SEARCH)
    kept, ablation = (cells_of(OFFLINE / f"pocket-large.{part}.sweep.toml") for part in ("winners", "ablation"))
    others = [p for p in cells_of(SEARCH) if p.axes["task"] == "pocket-memes"]
    others = [p for p in others if p.kind == "federated" and p.experiment.algorithm.name == "fedavg"]
    assert Counter((cell(p), rates(p)) for p in searched) == Counter((cell(p), rates(p)) for p in others)
    small = [p for p in cells_of(OFFLINE / "pocket-qwen.ablation.sweep.toml") if p.axes["strategy"] != "gap strength"]
    assert Counter(map(cell, ablation)) == Counter(map(cell, small))
    (of_ablation,) = set(map(rates, ablation))
    assert of_ablation in set(map(rates, kept))
    models = {(p.experiment.model.name, p.experiment.model.precision) for p in (*searched, *kept, *ablation)}
    assert models == {("build/pocket-large", "bf16")}


def test_every_method_of_the_study_of_todays_methods_was_searched() -> None:
    studies = OFFLINE.parent / "studies"
    trials = cells_of(studies / "methods-search.sweep.toml")
    searched = Counter(p.axes["trial"].split(",")[0] for p in trials)
    assert set(searched.values()) == {9}
    assert {p.experiment.eval.split for p in trials} == {"validation"}
    assert len({p.id for p in trials}) == len(trials), "every trial is a run of its own"
    trained = {p.axes["method"] for p in cells_of(studies / "methods.sweep.toml") if p.kind == "federated"}
    assert trained == searched.keys()


@pytest.mark.parametrize("task", TASKS)
def test_a_base_file_has_data(task: str) -> None:
    raw, notes = apply_overrides(read(OFFLINE / f"{task}.toml"), [])
    assert notes == []
    data = build(validate(raw)).prepare()
    samples = {"openmoji": (300, 300), "pocket-memes": (200, 500), "qa": (600, 600)}
    assert (len(data.train), len(data.test)) == samples[task]


def test_the_guide_tells_the_settings_of_the_cells() -> None:
    guide = (OFFLINE.parents[1] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in guide.splitlines() if line.startswith("|")]
    told = {row[0].strip("`"): dict(zip(TASKS, row[1:], strict=True)) for row in rows if len(row) == 1 + len(TASKS)}
    for task in TASKS:
        for kind in ("sweep", "others.sweep"):
            axes = {axis["name"]: axis["cells"] for axis in read(OFFLINE / f"{task}.{kind}.toml", "sweep")["axes"]}
            for cell in axes["method"]:
                if cell.get("kind") == "zero-shot":
                    continue
                options = {name: value for name, value in cell.get("set", {}).items() if name != "algorithm.name"}
                found = ", ".join(f"{name.split('.')[1]} {value:g}" for name, value in options.items())
                name = cell.get("set", {}).get("algorithm.name", cell["name"])
                assert told[name][task] == found, (task, name)


def test_a_task_of_the_transfer_study_is_tested_on_the_set_that_the_others_are_asked() -> None:
    seen = set()
    for planned in plan_sweep(OFFLINE.parent / "studies" / "transfer.sweep.toml")[1]:
        config = with_defaults(planned.experiment)
        (other,) = [table for table in config.eval.transfer or () if table.name == config.task.name]
        mine, asked = ({**table.options, "test_samples": table.test_samples} for table in (config.task, other))
        for table in (mine, asked):  # how much there is to train on
            table.pop("train", None)
        assert mine == asked, config.task.name
        seen.add(config.task.name)
    assert seen == {"pocket-memes", "easy-vqa", "shapes-qa", "openmoji"}


def test_attacks_and_defences_meet_the_same_data_and_attackers() -> None:
    planned = [p for p in plan_sweep(OFFLINE.parent / "studies" / "attacks.sweep.toml")[1] if p.kind == "federated"]
    assert len({p.id for p in planned}) == len(planned)
    for replicate in range(5):
        cells = [p.experiment for p in planned if p.replicate == replicate]
        assert len({(config.seed, config.task.draw) for config in cells}) == 1
        attackers = {
            (config.attack.options["share"], attack.attackers(config.partition.clients, config.seed))
            for config in cells
            if (attack := attacks.build(config.attack.name, config.attack.options))
        }
        (few, some), (more, many) = sorted(attackers, key=lambda pair: pair[0])
        assert (few, len(some), more, len(many)) == (0.2, 3, 0.4, 6)
        assert some < many


def trained_cells(study: str, axis: int = -1) -> dict[str, Experiment]:
    """The first replicate's experiment of each trained cell, by its place on one axis."""
    planned = plan_sweep(OFFLINE.parent / "studies" / f"{study}.sweep.toml")[1]
    return {
        str(list(p.axes.values())[axis]): with_defaults(p.experiment)
        for p in planned
        if p.kind == "federated" and not p.replicate
    }


def test_studies_compare_equal_rates() -> None:
    graded, drift = trained_cells("graded", 0), trained_cells("drift", 0)
    rates = {name: config.scenario.options for name, config in graded.items()}
    means = [options.get("rate") or (options["image"] + options["text"]) / 2 for options in rates.values()]
    assert len(means) == 3
    assert set(means) == {0.5}
    chains = [config.scenario.options for config in drift.values()]
    assert len(chains) == 4
    assert all(options["lose"] == options["regain"] for options in chains)


def test_servers_of_the_stragglers_study_use_the_same_number_of_updates() -> None:
    cells = trained_cells("stragglers")
    per_step = dict.fromkeys(cells, 4) | {"FedBuff": cells["FedBuff"].asynchronous.options["buffer"], "FedAsync": 1}
    assert {config.train.rounds * per_step[name] for name, config in cells.items()} == {48}
    assert len({(config.seed, config.task.draw, config.train.lr) for config in cells.values()}) == 1
    assert {config.train.rounds % config.eval.every for config in cells.values()} == {0}
