"""Notes on settings and scores that are allowed and rarely meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import call, run
from fedmllm import config
from fedmllm.config import Experiment
from fedmllm.runs.hints import of_result, of_settings

Write = Callable[..., Path]


def experiment(**train: Any) -> Experiment:
    return config.validate({"task": {"name": "easy-vqa"}, "partition": {"clients": 10}, "train": {"batch_size": 4, **train}})


def noted(settings: Experiment, sizes: list[int] | None = None, sampled: int = 10, excluded: int = 0, tested: int = 500) -> str:
    """The only note, or nothing."""
    everyone = range(10)
    notes = list(of_settings(settings, sizes or [20] * 10, everyone[:sampled], everyone[10 - excluded :], tested))
    assert len(notes) <= 1, notes
    return notes[0] if notes else ""


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        ({"lr": 0.1}, "train.lr = 0.1 is far above the usual 1e-5 to 1e-2 of AdamW on adapters, so that training may diverge"),
        ({"lr": 1e-8}, "train.lr = 1e-08 is far below the usual 1e-5 to 1e-2 of AdamW on adapters, so that little is learned"),
        ({"lr": 0.03}, ""),
        ({"lr": 1e-6}, ""),
        ({"lr": 0.1, "optimizer": "sgd"}, ""),
    ],
)
def test_learning_rates(train: dict[str, Any], sentence: str) -> None:
    assert noted(experiment(**train)) == sentence


def test_clients_that_are_never_sampled() -> None:
    assert noted(experiment(rounds=3), sampled=9) == ""
    assert noted(experiment(rounds=3), sampled=8).startswith(
        "2 of 10 clients are never sampled in 3 rounds with 2 clients each, so that nobody learns from their data; raise"
    )
    assert noted(experiment(rounds=3), sampled=7, excluded=3) == "", "of those without the memory, another note speaks"


def test_clients_with_less_than_a_batch() -> None:
    assert noted(experiment(), [3] * 4 + [4] * 6) == ""
    assert noted(experiment(), [3] * 5 + [4] * 5).startswith(
        "5 of 10 clients hold fewer samples than a batch, so that they make one step per epoch; lower train.batch_size = 4 or"
    )
    own = config.validate(
        {"task": {"name": "easy-vqa"}, "partition": {"clients": 10}, "clients": {"batch_size": [2, 64]}, "train": {"lr": 1e-3}}
    )
    assert noted(own).startswith("5 of 10 clients hold fewer"), "by each client's own batch size"


@pytest.mark.parametrize(("tested", "points"), [(97, None), (96, 10), (24, 20), (1, 98)])
def test_a_test_set_too_small(tested: int, points: int | None) -> None:
    expected = (
        "" if points is None else f"with {tested} test samples, the 95 % interval of an accuracy reaches up to {points} points"
    )
    note = noted(experiment(), tested=tested)
    assert note.startswith(expected)
    assert bool(note) == bool(expected)


def test_scores_that_are_not_above_the_most_frequent_answer() -> None:
    metrics = {
        "both": {"accuracy": 0.7, "majority": 0.6}, "image": {"accuracy": 0.6, "majority": 0.6}, "text": {"accuracy": 0.1},
    }  # fmt: skip
    result = {"kind": "federated", "primary_metric": "accuracy", "metrics": metrics}
    (note,) = of_result(result)
    assert note == "accuracy 60.0 % under 'image' is not above the 60.0 % of always giving the most frequent answer"
    assert list(of_result({**result, "kind": "zero-shot"})) == [], "of an untrained model, that is expected"


def test_check_and_run_say_them(write_experiment: Write, tmp_path: Path) -> None:
    file = write_experiment(rounds=1)
    checked = run("check", file, "--set", "train.lr=0.5")["notes"]
    assert [note.partition(" ")[0] for note in checked] == ["12", "train.lr", "2", "with"], "the first is about shared rows"
    done = call("run", file, "--set", "train.lr=0.5", "--out", tmp_path / "run", "--json")
    assert all(f"note: {note}\n" in done.stderr for note in checked)
    told = list(of_result(json.loads(done.stdout)))
    assert all(f"note: {note}\n" in done.stderr for note in told)
