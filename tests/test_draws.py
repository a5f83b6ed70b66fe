"""Draws of data: subsets that keep the shares of the labels, `task.draw`, and the replicates of a sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from commands import call, run
from fedmllm.config import Experiment, TaskTable
from fedmllm.data.dataset import load_split, open_source
from fedmllm.data.samples import Sample
from fedmllm.data.subsets import draw_stratified, draw_subset
from fedmllm.data.tasks import tasks
from helpers import HETEROGENEITY, load_samples

Write = Callable[..., Path]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.data())
def test_every_label_keeps_its_share(labels: list[str], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(labels)))
    drawn = draw_stratified(labels, count, np.random.default_rng(0))
    assert len(set(drawn)) == len(drawn) == count
    chosen, totals = Counter(labels[i] for i in drawn), Counter(labels)
    assert all(abs(chosen[label] - count * total / len(labels)) <= 1 for label, total in totals.items())


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.data())
def test_a_balanced_draw_has_equally_many_of_each_label_or_all_of_them(labels: list[str], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(labels)))
    drawn = draw_stratified(labels, count, np.random.default_rng(0), balanced=True)
    assert len(set(drawn)) == len(drawn) == count
    chosen, totals = Counter(labels[i] for i in drawn), Counter(labels)
    assert all(chosen[label] >= min(total, max(chosen.values()) - 1) for label, total in totals.items())


def test_a_task_is_balanced_with_and_without_a_draw() -> None:
    def labels(**options: Any) -> list[int]:
        settings = TaskTable.model_validate({"name": "easy-vqa", "train_samples": 26, **options})
        return sorted(Counter(s.label for s in load_split(open_source(settings), "train")[1]).values())

    assert labels(balanced=True) == labels(balanced=True, draw=3) == [2] * 13
    assert labels(balanced=False) == labels() != [2] * 13


def test_a_setting_that_is_left_out_is_not_in_a_runs_id() -> None:
    """Packed runs of versions before `task.balanced` keep their ids."""
    assert "balanced" not in Experiment.model_validate({"task": {"name": "openmoji"}}).resolved()["task"]


def test_a_draw_is_reproducible_and_differs_from_other_draws() -> None:
    samples = [Sample(f"{i:03d}", "q", "ab"[i % 2], label="ab"[i % 2]) for i in range(100)]
    drawn = {draw: [s.id for s in draw_subset(samples, 20, ("t", "test"), draw)] for draw in (None, 0, 1)}
    assert drawn[1] == [s.id for s in draw_subset(samples, 20, ("t", "test"), 1)]
    assert len({tuple(ids) for ids in drawn.values()}) == 3
    assert [Counter(int(i) % 2 for i in drawn[draw]) for draw in (0, 1)] == [{0: 10, 1: 10}] * 2
    assert drawn[None][:4] == ["000", "001", "005", "007"], "the subsets of earlier versions"
    assert all(ids == sorted(ids) for ids in drawn.values())


def table(draw: int | None, **options: Any) -> TaskTable:
    return TaskTable.model_validate({"name": "pocket-memes", "n": 8, "test": 8, "draw": draw} | options)


def test_a_draw_sets_the_seed_of_a_generated_task_and_of_its_companion() -> None:
    def texts(settings: TaskTable) -> list[str | None]:
        return [sample.text for sample in load_split(open_source(settings), "test")[1]]

    assert texts(table(5)) == texts(table(None, seed=5)) != texts(table(6))
    companion = {"name": "shapes-qa", "train": 8, "test": 8}
    settings = TaskTable.model_validate({"name": "easy-vqa", "test_samples": 8, "draw": 5, "companion": companion})
    opened = open_source(settings).companion
    assert opened is not None
    assert opened.table.draw == 5
    expected = load_samples(tasks.build("shapes-qa", {"train": 8, "test": 8, "seed": 5}), "test", "error").samples
    assert texts(settings)[-8:] == [s.text for s in expected]


def test_emoji_are_split_anew_by_group() -> None:
    splits = [{split: load_samples(tasks.build("openmoji", {"seed": seed}), split, "error").samples
               for split in ("train", "test")} for seed in (1, 2)]  # fmt: skip
    ids = [{split: {s.id for s in samples} for split, samples in by_split.items()} for by_split in splits]
    assert ids[0]["train"] | ids[0]["test"] == ids[1]["train"] | ids[1]["test"]
    assert not ids[0]["train"] & ids[0]["test"]
    assert ids[0]["test"] != ids[1]["test"]
    groups = Counter(s.label for samples in splits[0].values() for s in samples)
    tested = Counter(s.label for s in splits[0]["test"])
    assert all(abs(tested[group] - 0.2 * count) <= 2 for group, count in groups.items())


GRID = """
name = "grid"
base = "small.toml"
replicates = 3
margin = 1.0
"""
GRID += HETEROGENEITY
GRID += """
[[axes]]
name = "method"
cells = [
    { name = "zero-shot", kind = "zero-shot" },
    { name = "centralised", kind = "centralised" },
    { name = "FedAvg" },
    { name = "FedYogi", set = { "algorithm.name" = "fedyogi", "train.lr" = 0.1 } },
]
"""


def test_a_replicate_belongs_to_one_place_and_is_shared_by_its_methods(write_experiment: Write, tmp_path: Path) -> None:
    write_experiment()
    file = tmp_path / "grid.toml"
    file.write_text(GRID)
    rows = run("sweep", file, "--dry-run")["cells"]
    draws: dict[tuple[str, int], set[int]] = {}
    for row in rows:
        draws.setdefault((row["axes"]["heterogeneity"], row["replicate"]), set()).add(row["draw"])
        assert row["seed"] == row["draw"]
    assert [len(shared) for shared in draws.values()] == [1] * 6, "all methods of a place share its draws"
    assert len(set.union(*draws.values())) == 6, "no two places or replicates share a draw"
    assert len({row["id"] for row in rows}) == len(rows) == 24, "the baselines' runs differ between units too"
    searched = run("sweep", file, "--dry-run", "--set", "eval.split=validation")["cells"]
    assert not {row["draw"] for row in searched} & {row["draw"] for row in rows}, "a search uses other draws than the grid"
    assert "replicate 2" in call("sweep", file, "--dry-run").stdout
    file.write_text(GRID.replace("margin", "seeds = [0, 1]\nmargin"))
    refused = call("sweep", file, "--dry-run")
    assert refused.exit_code == 2
    assert "replicates have seeds of their own; give either seeds or replicates" in refused.stderr
    file.write_text(GRID.replace("replicates = 3", 'replicates = 3\nset = { "task.draw" = 1 }'))
    assert "sets task.draw, which every replicate has of its own" in call("sweep", file, "--dry-run").stderr
