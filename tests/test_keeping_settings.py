"""What rounds are scored on, which choices among their models are refused, and what a table says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedmllm.config import read, validate
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build, with_defaults
from fedmllm.experiment.sweep import essential
from fedmllm.kinds import RunKind
from fedmllm.report.tables import comparison
from helpers import apply_overrides
from made_files import RESULT

Write = Callable[..., Path]
SCORED = 'every = 1\nevery_split = "validation"\nvalidation_share = 0.2\n'


# What rounds are scored on


def dataset_of(file: Path, *overrides: str) -> Any:
    raw, _ = apply_overrides(read(file), overrides)
    return build(with_defaults(validate(raw))).prepare()


def test_held_out_samples_are_neither_trained_nor_tested_on(write_experiment: Write) -> None:
    file = write_experiment(SCORED)
    dataset, searched, plain = (
        dataset_of(file),
        dataset_of(file, "eval.split=validation"),
        dataset_of(file, "eval.every_split=same"),
    )
    held_out = {s.id for s in dataset.of_rounds}
    assert len(held_out) == 6
    assert held_out == {s.id for s in searched.test}, "a search by the validation split holds out the same samples"
    assert searched.of_rounds is None
    assert plain.of_rounds is None
    assert {s.id for s in dataset.test} == {s.id for s in plain.test}
    assert {s.id for s in dataset.train} | held_out == {s.id for s in plain.train}
    assert not held_out & {s.id for s in dataset.train}
    assert set(dataset.manifest.ids.to_pylist()) == {s.id for s in dataset.train}


@pytest.mark.parametrize("split", ["same", "validation"])
def test_rounds_can_be_scored_on_fewer_samples(write_experiment: Write, split: str) -> None:
    file = write_experiment(SCORED)
    dataset = dataset_of(file, f"eval.every_split={split}", "eval.every_samples=4", 'eval.patterns=["both"]')
    among = dataset.test if split == "same" else dataset_of(file).of_rounds
    assert len(dataset.of_rounds) == 4
    assert {s.id for s in dataset.of_rounds} < {s.id for s in among}
    assert dataset_of(file, f"eval.every_split={split}", "eval.every_samples=99").test == dataset.test


# What is refused


PRIVATE = "privacy={name='user-level', delta=1e-3, noise=1.0}"
REFUSED: Mapping[str, tuple[Sequence[str], str]] = {
    "best without evaluation": (["train.keep=best", "eval.split=validation"], "eval.every = 0 scores none"),
    "best by the test set": (["train.keep=best", "eval.every=1"], 'set eval.every_split = "validation"'),
    "patience without evaluation": (["train.patience=2"], "train.patience = 2 goes by the scores of rounds"),
    "patience by the test set": (["train.patience=2", "eval.every=2"], "train.patience = 2 would go by scores on the test set"),
    "nothing is scored": (["eval.every_split=validation"], "eval.every = 0 scores none; set it to 1"),
    "fewer of nothing": (["eval.every_samples=5"], "eval.every_samples is for the rounds that are scored"),
    "a number without a mean": (["train.mean_of=2"], 'train.mean_of is for train.keep = "mean", and it is \'last\''),
    "a number beside the best": (["train.mean_of=2", "train.keep=best"], "it is 'best'"),
    "the best of own models": (
        ["train.keep=best", "eval.every=1", "eval.every_split=validation", "algorithm.name=fedsa-lora"],
        "algorithm.name = 'fedsa-lora' leaves part of each model with its client",
    ),
    "the mean of own models": (["train.keep=mean", "algorithm.name=fedsa-lora"], "who remembers the last round only"),
    "the mean of new factors": (["train.keep=mean", "algorithm.name=flexlora"], "makes new factors in each"),
    "the mean of new adapters": (["train.keep=mean", "algorithm.name=flora"], "makes new factors in each"),
    "the mean of singular vectors": (["train.keep=mean", "algorithm.name=fedsvd"], "makes new factors in each"),
    "the mean beside a fold": (["train.keep=mean", "algorithm.name=fedex-lora"], "also changes the base weights"),
    "the best in private": (
        ["train.keep=best", "eval.every=1", "eval.every_split=validation", PRIVATE],
        "held-out samples of clients decide",
    ),
    "patience in private": (
        ["train.patience=1", "eval.every=1", "eval.split=validation", PRIVATE],
        "which the ε of privacy.name = 'user-level' does not cover",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(write_experiment: Write, case: str) -> None:
    overrides, sentence = REFUSED[case]
    raw, _ = apply_overrides(read(write_experiment()), overrides)
    with pytest.raises(ConfigError) as refused:
        build(validate(raw))
    assert sentence in str(refused.value)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedadam", "scaffold", "rolora", "ffa-lora", "hetlora", "fedilora"])
def test_the_mean_is_of_plain_adapters(write_experiment: Write, algorithm: str) -> None:
    raw, _ = apply_overrides(read(write_experiment()), ["train.keep=mean", f"algorithm.name={algorithm}"])
    assert build(validate(raw)).config.train.keep == "mean"


def test_a_mean_costs_no_privacy(write_experiment: Write) -> None:
    raw, _ = apply_overrides(read(write_experiment()), ["train.keep=mean", PRIVATE])
    build(validate(raw))


def test_clients_alone_share_a_run_whatever_is_kept(write_experiment: Write) -> None:
    raw, _ = apply_overrides(read(write_experiment(SCORED)), ["train.keep=best", "train.patience=2"])
    best, plain = with_defaults(validate(raw)), with_defaults(validate(read(write_experiment(SCORED))))
    kinds: dict[RunKind, bool] = {"local": True, "zero-shot": True, "centralised": False, "federated": False}
    for kind, shared in kinds.items():
        assert (essential(best, kind).digest() == essential(plain, kind).digest()) == shared, kind


# What is shown


@pytest.mark.parametrize(
    ("changed", "cell"),
    [
        ({}, "4"), ({"keep": "last", "kept_rounds": [3]}, "4"), ({"keep": "best", "kept_rounds": [1]}, "4 (kept 2)"),
        ({"keep": "mean", "kept_rounds": [2, 3]}, "4 (mean of 2)"),
        ({"keep": "best", "kept_rounds": [0], "stopped_early": True}, "4 (stopped early, kept 1)"),
        ({"keep": "last", "kept_rounds": [3], "stopped_early": True}, "4 (stopped early)"),
        ({"keep": "best", "kept_rounds": []}, "4"),
    ],
)  # fmt: skip
def test_a_table_says_what_was_kept(changed: dict[str, Any], cell: str) -> None:
    keys = ("keep", "kept_rounds", "stopped_early")
    result = {key: value for key, value in RESULT.items() if key not in keys} | {"rounds": 4, **changed}
    (column,) = [column for column in comparison([result]).columns if column.header == "rounds"]
    assert list(column.cells) == [cell]
