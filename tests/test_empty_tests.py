"""What cannot be tested is refused before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands import call, run
from fedmllm.data.dataset import check_patterns
from fedmllm.data.samples import Sample
from fedmllm.errors import ConfigError
from fedmllm.report.grids import read_grid, row_score
from fedmllm.report.tables import comparison
from fedmllm.storage.run_dir import RunDir
from helpers import sample, task
from made_runs import make_sweep

Write = Callable[..., Path]
CHOICES = ("yes", "no")
YES, NO = sample("a", choices=CHOICES), sample("b", choices=CHOICES, answer="no")
OPEN = sample("c", answer="red")
RANKED = replace(task(), metric="auc", positive="yes")


@pytest.mark.parametrize(
    ("patterns", "kind", "message"),
    [
        (["image"], "text", "eval.patterns: 'image' tests nothing, because no sample of the test split has an image"),
        (["both", "text"], "image", "eval.patterns: 'text' tests nothing, because no sample of the test split has a text"),
        (["both", "image"], "none", "eval.patterns: 'image' tests nothing"),
    ],
)
def test_a_pattern_that_no_sample_has_is_refused(patterns: Any, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_patterns(patterns, task(), [sample("a", kind), sample("b", kind)], "the test split")
    check_patterns(patterns, task(), [sample("a", kind), sample("b", "both")], "the test split")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([OPEN], "'yes' is not among the choices of any sample of the test split under the pattern 'both'"),
        ([NO, NO, OPEN], "'yes' is the answer of no sample of the test split under the pattern 'both'.*the answers are 'no'"),
        ([YES, OPEN], "'yes' is the answer of every sample of the test split under the pattern 'both'"),
        ([YES, replace(NO, image=None)], "'yes' is the answer of every sample of the test split under the pattern 'image'"),
        ([replace(YES, choices=("Yes", "No"), answer="Yes"), NO], "'yes' is the answer of no sample"),
    ],
)
def test_auc_needs_both_classes_under_every_pattern(samples: Sequence[Sample], message: str) -> None:
    with pytest.raises(ConfigError, match=f"task.positive: {message}"):
        check_patterns(["both", "image"], RANKED, samples, "the test split")
    check_patterns(["both", "image"], RANKED, [*samples, YES, NO], "the test split")


def without_images(dataset: Path, folder: Path) -> str:
    """A `--set` for test data of which no sample has an image."""
    lines = [json.loads(line) for line in (dataset / "test.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key != "image"} for line in lines]
    (folder / "plain.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept if "text" in line))
    return str(folder / "plain.jsonl")


def test_check_run_and_sweep_refuse_before_training(
    write_experiment: Write, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, plain = write_experiment(), without_images(dataset, tmp_path)
    message = "eval.patterns: 'image' tests nothing, because no sample of the test split has an image; leave it out."
    for command in (("check", file), ("run", file), ("baseline", "zero-shot", file)):
        refused = call(*command, "--set", f"task.test={plain}")
        assert (refused.exit_code, refused.stderr) == (2, f"error: {message}\n")
    other = ("--set", f'eval.transfer=[{{name = "jsonl", train = "{plain}", test = "{plain}"}}]')
    for name in ("check", "run"):
        refused = call(name, file, *other, "--set", 'eval.patterns=["image"]')
        assert refused.exit_code == 2
        assert "'image' tests nothing, because no sample of 'jsonl' in eval.transfer has an image" in refused.stderr
    assert not list(tmp_path.glob("runs/*"))
    assert run("check", file, *other)["test_samples"] == 12, "another task need not have every modality"
    assert run("check", file, "--set", f"task.test={plain}", "--set", 'eval.patterns=["text"]')["test_samples"] > 0


def test_tables_say_that_an_old_run_tested_nothing(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "made", {"scenario": "x", "method": "y"}, lambda cell, seed, pattern: 0.5)
    for file in folder.glob("*/result.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": {}}))
    (row,) = read_grid(folder).rows
    assert row_score(row) == "no such samples"
    results = [RunDir(file.parent).result() for file in folder.glob("*/result.json")]
    full = results[0] | {"metrics": {"both": {"accuracy": 0.5, "accuracy_ci": [0.4, 0.6]}}}
    table = comparison([results[0] | {"algorithm": "fedavg"}, full])
    assert [list(column.cells) for column in table.columns if column.header == "both"] == [
        ["no such samples", "50.0 [40.0, 60.0]"]
    ]
