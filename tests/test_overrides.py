"""Settings from the command line: how they are read, what they change, and who is blamed for a wrong one."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from fedmllm import config
from fedmllm.algorithms import algorithms
from fedmllm.data.scenarios import scenarios
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import options_of, with_defaults
from helpers import apply_overrides

MINIMAL: dict[str, Any] = {"task": {"name": "easy-vqa"}}
HYBRID: dict[str, Any] = {**MINIMAL, "scenario": {"name": "hybrid", "presence": 0.6}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.rounds=5", (["train", "rounds"], 5)),
        ("train.lr = 1e-3", (["train", "lr"], 1e-3)),
        ("name=my-run", (["name"], "my-run")),
        ("name='5'", (["name"], "5")),
        ("model.cache_features=false", (["model", "cache_features"], False)),
        ('eval.patterns=["both", "image"]', (["eval", "patterns"], ["both", "image"])),
        ("task.train=a=b.jsonl", (["task", "train"], "a=b.jsonl")),
    ],
)
def test_overrides_are_read_as_toml_or_as_text(text: str, expected: tuple[list[str], Any]) -> None:
    assert config.parse_override(text) == expected


@pytest.mark.parametrize("text", ["rounds", "=5", "train..rounds=5", "", ".=1"])
def test_an_override_must_have_a_key_and_a_value(text: str) -> None:
    with pytest.raises(ConfigError, match=r"write it as key=value"):
        config.parse_override(text)


def test_overrides_create_tables_and_leave_the_file_unchanged() -> None:
    raw = deepcopy(HYBRID)
    changed, notes = apply_overrides(raw, ["model.lora.rank=4", "seed=7", "scenario.presence=0.1"])
    assert raw == HYBRID
    assert not notes
    experiment = config.validate(changed)
    assert (experiment.model.lora.rank, experiment.seed, experiment.scenario.options) == (4, 7, {"presence": 0.1})


def test_another_scenario_drops_the_options_that_it_does_not_know() -> None:
    changed, notes = apply_overrides(HYBRID, ["scenario.name=cross"])
    assert changed["scenario"] == {"name": "cross"}
    assert notes == ["scenario.presence = 0.6 is an option of 'hybrid' and was dropped"]


def test_another_algorithm_keeps_the_options_that_both_know() -> None:
    raw = {**MINIMAL, "algorithm": {"name": "fedprox", "mu": 0.5, "server_lr": 0.5}}
    changed, notes = apply_overrides(raw, ["algorithm.name=fedavg"])
    assert changed["algorithm"] == {"name": "fedavg", "server_lr": 0.5}
    assert len(notes) == 1
    assert algorithms.build("fedavg", config.validate(changed).algorithm.options)


def test_a_misspelt_option_is_kept_and_refused() -> None:
    raw = {**MINIMAL, "scenario": {"name": "hybrid", "presense": 0.6}}
    changed, notes = apply_overrides(raw, ["scenario.name=cross"])
    assert not notes
    with pytest.raises(ConfigError, match=r"scenario\.presense: unknown key for scenario 'cross'"):
        scenarios.build("cross", config.validate(changed).scenario.options)


TEST_SETS = {"task": {"name": "pocket-memes", "test": 500, "n": 800, "train_samples": 100}}


@pytest.mark.parametrize(
    ("raw", "setting", "expected", "dropped"),
    [
        (TEST_SETS, "task.name=shapes-qa", {"name": "shapes-qa", "train_samples": 100}, ["task.n", "task.test"]),
        (TEST_SETS, "task.name=pocket-memes", TEST_SETS["task"], []),
        ({"task": {"name": "jsonl", "train": "a", "test": "b"}}, "task.name=shapes-qa", {"name": "shapes-qa"},
         ["task.test", "task.train"]),
        ({"task": {"name": "slake", "data_dir": "a", "language": "zh"}}, "task.name=vqa-rad", {"name": "vqa-rad"},
         ["task.data_dir", "task.language"]),
        ({"task": {"name": "easy-vqa", "companion": {"name": "shapes-qa", "test": 3}}}, "task.companion.name=pocket-memes",
         {"name": "easy-vqa", "companion": {"name": "pocket-memes"}}, ["task.companion.test"]),
        ({"task": {"name": "easy-vqa", "companion": {"name": "shapes-qa", "test": 3}}},
         'task.companion={name="medalpaca", data_dir="a"}',
         {"name": "easy-vqa", "companion": {"name": "medalpaca", "data_dir": "a"}}, []),
    ],
)  # fmt: skip
def test_another_task_keeps_no_option_of_the_old_one(
    raw: dict[str, Any], setting: str, expected: dict[str, Any], dropped: list[str]
) -> None:
    changed, notes = apply_overrides(raw, [setting])
    assert changed["task"] == expected
    assert [note.partition(" = ")[0] for note in notes] == dropped


def test_options_of_the_default_part_are_dropped_too() -> None:
    changed, notes = apply_overrides({**MINIMAL, "algorithm": {"server_lr": 0.5}}, ["algorithm.name=feddyn"])
    assert changed["algorithm"] == {"name": "feddyn"}
    assert notes == ["algorithm.server_lr = 0.5 is an option of 'fedavg' and was dropped"]


@pytest.mark.parametrize(
    "setting", ["model={lora={rank=4}}", "model.lora={rank=4}", "model.lora.rank=4", 'model={"lora.rank"=4}']
)
def test_a_table_as_value_changes_a_table_and_does_not_replace_it(setting: str) -> None:
    raw = {**MINIMAL, "model": {"name": "m", "lora": {"rank": 8, "alpha": 16}}}
    changed, _ = apply_overrides(raw, [setting])
    assert changed["model"] == {"name": "m", "lora": {"rank": 4, "alpha": 16}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "exp.toml: train.lr: input should be greater than 0, got 0."),
        (["train.rounds=3"], "exp.toml: train.lr: input should be greater than 0, got 0."),
        (["train.lr=0"], "--set train.lr: input should be greater than 0, got 0."),
        (["train={lr=0}"], "--set train.lr: input should be greater than 0, got 0."),
        (["trian.rounds=3", "train.lr=1"], "--set trian: unknown key; did you mean 'train'?"),
        (["train.ruonds=3"], "--set train.ruonds: unknown key; did you mean 'rounds'? (and 1 more)"),
        (['eval.patterns=["both", "sound"]', "train.lr=1"],
         "--set eval.patterns.1: input should be 'both', 'image' or 'text', got 'sound'."),
        (["algorithm.sever_lr=3", "train.lr=1"],
         "--set algorithm.sever_lr: unknown key for algorithm 'fedavg'; did you mean 'server_lr'?"),
        (["partition.clients=1", "train.lr=1"],
         "--set train.clients_per_round = 2 is more than partition.clients = 1; lower the first or raise the second."),
    ],
)  # fmt: skip
def test_a_bad_setting_is_blamed_on_whom_it_came_from(settings: list[str], message: str) -> None:
    parsed = [config.parse_override(setting) for setting in settings]
    raw, _ = config.apply_settings({**MINIMAL, "train": {"lr": 0}}, parsed, options_of)
    with pytest.raises(ConfigError) as caught, config.blaming("exp.toml", parsed):
        with_defaults(config.validate(raw))
    assert str(caught.value) == message


@pytest.mark.parametrize("order", [1, -1])
def test_options_given_with_the_new_name_belong_to_it_in_either_order(order: int) -> None:
    overrides = ["scenario.name=cross", "scenario.image_clients=3", "scenario.presence=0.1"][::order]
    changed, notes = apply_overrides(HYBRID, overrides)
    # The option from the file is dropped; the one on the command line is a mistake and is kept, so that it is refused.
    assert changed["scenario"] == {"name": "cross", "image_clients": 3, "presence": 0.1}
    assert notes == ["scenario.presence = 0.6 is an option of 'hybrid' and was dropped"]


@pytest.mark.parametrize("order", [1, -1])
def test_another_task_has_no_companion_but_one_of_its_own(order: int) -> None:
    raw = {**MINIMAL, "task": {"name": "easy-vqa", "companion": {"name": "shapes-qa", "train": 30}}}
    overrides = ["task.companion.name=openmoji", "task.name=pocket-memes"]
    alone, notes = apply_overrides(raw, overrides[1:])
    assert alone["task"] == {"name": "pocket-memes"}
    assert notes == ["task.companion is the companion of 'easy-vqa' and was dropped"]
    assert apply_overrides(raw, overrides[::order]) == (
        {**raw, "task": {"name": "pocket-memes", "companion": {"name": "openmoji"}}}, notes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scenario.name=crss", "--set scenario.name=crss: scenario.name: there is no scenario 'crss'; did you mean 'cross'?"),
        ("seed.deep=1", "--set seed.deep: seed is a value, not a table."),
    ],
)
def test_an_invalid_override_is_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({**HYBRID, "seed": 0}, [override])
    assert str(caught.value) == message


def test_another_scenario_drops_the_options_of_earlier_versions_too() -> None:
    raw = {**MINIMAL, "scenario": {"name": "missing", "never_empty": True}}
    changed, notes = apply_overrides(raw, ["scenario.name=cross"])
    assert changed["scenario"] == {"name": "cross"}
    assert notes == ["scenario.never_empty = True is an option of 'missing' and was dropped"]


def test_an_option_of_an_earlier_version_means_the_same_experiment() -> None:
    former, current = (
        with_defaults(config.validate({**MINIMAL, "scenario": {"name": "missing", **options}}))
        for options in ({"never_empty": True}, {"empty": "redraw"})
    )
    assert former == current
    assert former.digest() == current.digest()
    assert former.scenario.options == {"rate": 0.3, "empty": "redraw"}
