"""Every registered scenario, partition, prompt strategy, task and model family keeps the contract of `fedmllm.testing`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmllm.data.partitions import partitions
from fedmllm.data.prompts import prompts
from fedmllm.data.samples import Sample, Task
from fedmllm.data.scenarios import BOTH, Scenario, scenarios
from fedmllm.data.tasks import tasks
from fedmllm.evaluation.judges import judges
from fedmllm.evaluation.suites import suites
from fedmllm.fleets.options import fleets
from fedmllm.models.families import Family, families
from fedmllm.registry import Registry
from fedmllm.secure.settings import secures
from fedmllm.testing import check_family, check_partition, check_prompt, check_scenario, check_suite, check_task
from fedmllm.testing.registered import check_registered


def is_built_in(name: str) -> bool:
    """Whether the task makes its own data, with a number of samples that can be set."""
    defaults = tasks.defaults(name)
    return "train" in defaults and tasks.option_names(name) == sorted(defaults)


@pytest.mark.parametrize("name", scenarios.names())
def test_every_scenario_keeps_the_contract(name: str) -> None:
    check_scenario(name)


@pytest.mark.parametrize("name", partitions.names())
def test_every_partition_keeps_the_contract(name: str) -> None:
    check_partition(name)


@pytest.mark.parametrize("name", prompts.names())
def test_every_prompt_keeps_the_contract(name: str) -> None:
    check_prompt(name)


@pytest.mark.parametrize("name", suites.names())
def test_every_suite_keeps_the_contract(name: str) -> None:
    check_suite(name)


@pytest.mark.parametrize("name", families.names())
def test_every_family_keeps_the_contract(name: str) -> None:
    check_family(name)


def test_a_family_with_a_checkpoint_keeps_the_contract(tiny: Path) -> None:
    check_family("idefics3", tiny)


@pytest.mark.parametrize("name", [name for name in tasks.names() if is_built_in(name)])
def test_every_built_in_task_keeps_the_contract(name: str) -> None:
    options = {key: 40 for key in ("train", "test") if isinstance(tasks.defaults(name).get(key), int)}
    check_task(name, **options)


def test_a_task_of_files_keeps_the_contract(dataset: Path) -> None:
    check_task("jsonl", train=str(dataset / "train.jsonl"), test=str(dataset / "test.jsonl"))


@pytest.mark.parametrize("registry", [tasks, judges, fleets, secures], ids=lambda registry: registry.kind)
def test_every_part_is_registered_as_it_should(registry: Registry[Any]) -> None:
    for name in registry.names():
        check_registered(registry, name)


# What the contracts find


def registered(monkeypatch: pytest.MonkeyPatch, registry: Registry[Any], part: Any) -> None:
    def factory() -> object:
        """A part that breaks its contract."""
        return part

    monkeypatch.setitem(registry._discovered, "broken", factory)


def see_more(sample: Sample, client: int, rng: np.random.Generator) -> frozenset[Any]:
    return BOTH


def everyone(number: int, rng: np.random.Generator) -> list[frozenset[Any]]:
    return [BOTH] * number


def no_modality(number: int, rng: np.random.Generator) -> list[frozenset[Any]]:
    return [frozenset()] * number


CALLS = count()


def in_the_order_of_calls(number: int, rng: np.random.Generator) -> list[frozenset[Any]]:
    return [frozenset(("image",)) if next(CALLS) % 2 else BOTH] * number


def one_sample(split: str) -> list[Sample]:
    return [Sample("a", "what?", "yes", text="words")]


BROKEN = [
    (check_scenario, scenarios, Scenario(everyone, see_more), "of a sample with"),
    (check_scenario, scenarios, Scenario(no_modality), "a client without a modality"),
    (
        check_scenario,
        scenarios,
        Scenario(everyone, expected=lambda kind, number: {BOTH: 0.5}),
        "modalities that a sample lacks",
    ),
    (check_scenario, scenarios, Scenario(everyone, expected=lambda kind, number: {kind: 1.5}), "are no probabilities"),
    (check_scenario, scenarios, Scenario(in_the_order_of_calls), "depends on more than its generator"),
    (check_partition, partitions, lambda samples, clients, rng: np.full(len(samples), 4), "a client that may not hold it"),
    (check_partition, partitions, lambda samples, clients, rng: np.full(1, clients[0]), "1 owners for 7 samples"),
    (check_prompt, prompts, lambda question, visible: "Answer.", "is not in 'Answer.'"),
    (check_task, tasks, Task("t", "auc", one_sample), "AUC needs `positive`"),
    (check_task, tasks, Task("t", "auc", one_sample, positive="no"), "no sample of train is 'no'"),
    (check_task, tasks, Task("t", "accuracy", lambda split: one_sample(split) * 2), "an id is used twice in the train split"),
    (check_task, tasks, Task("t", "accuracy", lambda split: []), "the train split has no sample"),
    (check_family, families, Family(template="{{ 1 }}"), "not in the template's prompt"),
    (check_family, families, replace(Family(), layer_of=lambda name: -1), r"layer_of\(.*\) is -1"),
]


@pytest.mark.parametrize(("check", "registry", "part", "sentence"), BROKEN, ids=[sentence for *_, sentence in BROKEN])
def test_the_contract_finds_a_broken_part(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[str], None], registry: Registry[Any], part: Any, sentence: str
) -> None:
    registered(monkeypatch, registry, part)
    with pytest.raises(AssertionError, match=sentence):
        check("broken")


def test_the_contract_finds_bad_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def positional(alpha=0.5) -> object:  # type: ignore[no-untyped-def]
        """No sentence"""

    monkeypatch.setitem(partitions._discovered, "broken", positional)
    with pytest.raises(AssertionError, match=re.escape("partition 'broken': option 'alpha' must be keyword-only")):
        check_registered(partitions, "broken")
