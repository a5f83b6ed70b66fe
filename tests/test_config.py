from __future__ import annotations

import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm import config
from fedmllm.algorithms import algorithms
from fedmllm.config import Experiment
from fedmllm.data.scenarios import scenarios
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import options_of, with_defaults
from helpers import quick

SHIPPED = sorted((Path(__file__).parents[1] / "experiments").rglob("*.toml"))
SHIPPED = [path for path in SHIPPED if not path.name.endswith(".sweep.toml")]
MINIMAL: dict[str, Any] = {"task": {"name": "easy-vqa"}}
HYBRID: dict[str, Any] = {**MINIMAL, "scenario": {"name": "hybrid", "presence": 0.6}}


def refusal(raw: dict[str, Any], where: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        config.validate(raw, where)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiments_validate(path: Path) -> None:
    assert config.validate(config.read(path), str(path)).task.name


def test_defaults_are_the_documented_ones() -> None:
    experiment = config.validate(MINIMAL)
    assert (experiment.seed, experiment.partition.name, experiment.partition.clients) == (0, "iid", 10)
    assert (experiment.scenario.name, experiment.prompt.name, experiment.algorithm.name) == (
        "aligned",
        "modality-agnostic",
        "fedavg",
    )
    assert (experiment.train.rounds, experiment.train.clients_per_round, experiment.train.schedule) == (10, 2, "cosine")
    assert experiment.eval.patterns == ("both",)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "task: this key is required."),
        ({"task": {}}, "task.name: this key is required."),
        ({**MINIMAL, "trian": {}}, "trian: unknown key; did you mean 'train'?"),
        ({**MINIMAL, "train": {"round": 3}}, "train.round: unknown key; did you mean 'rounds'?"),
        ({**MINIMAL, "model": {"lora": {"rnak": 8}}}, "model.lora.rnak: unknown key; did you mean 'rank'?"),
        ({**MINIMAL, "train": {"rounds": "ten"}}, "train.rounds: input should be a valid integer, got 'ten'."),
        ({**MINIMAL, "train": {"rounds": True}}, "train.rounds: input should be a valid integer, got True."),
        ({**MINIMAL, "train": {"rounds": 2.0}}, "train.rounds: input should be a valid integer, got 2.0."),
        ({**MINIMAL, "train": {"rounds": 0}}, "train.rounds: input should be greater than or equal to 1, got 0."),
        ({**MINIMAL, "train": {"lr": 0}}, "train.lr: input should be greater than 0, got 0."),
        ({**MINIMAL, "train": {"lr": float("inf")}}, "train.lr: input should be a finite number, got inf."),
        ({**MINIMAL, "seed": -1}, "seed: input should be greater than or equal to 0, got -1."),
        ({**MINIMAL, "name": "a/b"}, "name: must be usable as a folder's name, got 'a/b'."),
        ({**MINIMAL, "name": ".."}, "name: must be usable as a folder's name, got '..'."),
        ({**MINIMAL, "eval": {"patterns": ["both", "sound"]}},
         "eval.patterns.1: input should be 'both', 'image' or 'text', got 'sound'."),
        ({**MINIMAL, "train": {"rounds": 0, "epochs": 0}},
         "train.rounds: input should be greater than or equal to 1, got 0. (and 1 more)"),
        ({**MINIMAL, "train": {"clients_per_round": 11}},
         "train.clients_per_round = 11 is more than partition.clients = 10; lower the first or raise the second."),
        ({**MINIMAL, "train": {"min_updates": 3}},
         "train.min_updates = 3 is more than train.clients_per_round = 2; lower the first or raise the second."),
        ({"task": {"name": "easy-vqa", "companion": {"train_samples": 5}}}, "task.companion.name: this key is required."),
    ],
)  # fmt: skip
def test_bad_settings_are_one_sentence(raw: dict[str, Any], message: str) -> None:
    assert refusal(raw) == message
    assert refusal(raw, "exp.toml") == f"exp.toml: {message}"


def test_validated_settings_cannot_be_changed() -> None:
    experiment = config.validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        experiment.train.rounds = 5  # type: ignore[misc]


def test_options_of_a_named_part_are_kept_apart_from_the_table() -> None:
    experiment = config.validate({**MINIMAL, "partition": {"name": "dirichlet", "clients": 4, "alpha": 0.1}})
    assert experiment.partition.options == {"alpha": 0.1}


@quick
@given(
    name=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8),
    rounds=st.integers(1, 10**6),
    lr=st.floats(1e-9, 10),
    companion=st.none() | st.just({"name": "shapes-qa", "seed": 3}),
    presence=st.floats(0, 1),
)
def test_a_resolved_file_reads_back_as_the_same_experiment(
    name: str, rounds: int, lr: float, companion: dict[str, Any] | None, presence: float
) -> None:
    experiment = config.validate(
        {
            "name": name,
            "task": {"name": "easy-vqa", "companion": companion},
            "scenario": {"name": "hybrid", "presence": presence},
            "train": {"rounds": rounds, "lr": lr},
        }
    )
    again = config.validate(tomllib.loads(experiment.toml()))
    assert again == experiment
    assert again.digest() == experiment.digest()


def test_the_digest_depends_only_on_the_settings() -> None:
    base = config.validate(MINIMAL).digest()
    spelled_out = {"seed": 0, **MINIMAL, "train": {"rounds": 10, "weight_decay": 0}}
    assert config.validate(spelled_out).digest() == base
    assert config.validate({**MINIMAL, "seed": 1}).digest() != base
    options = {"rate": 0.4, "empty": "drop"}
    first, second = (
        {**MINIMAL, "scenario": {"name": "missing", **dict(o)}} for o in (options.items(), reversed(options.items()))
    )
    assert config.validate(first).digest() == config.validate(second).digest() != base
    assert config.validate({**MINIMAL, "algorithm": {"name": "fedavg", "server_lr": 0.5}}).digest() != base


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
    changed, notes = config.apply_overrides(raw, ["model.lora.rank=4", "seed=7", "scenario.presence=0.1"], options_of)
    assert raw == HYBRID
    assert not notes
    experiment = config.validate(changed)
    assert (experiment.model.lora.rank, experiment.seed, experiment.scenario.options) == (4, 7, {"presence": 0.1})


def test_another_scenario_drops_the_options_that_it_does_not_know() -> None:
    changed, notes = config.apply_overrides(HYBRID, ["scenario.name=cross"], options_of)
    assert changed["scenario"] == {"name": "cross"}
    assert notes == ["scenario.presence = 0.6 is an option of 'hybrid' and was dropped"]


def test_another_scenario_drops_the_options_of_earlier_versions_too() -> None:
    raw = {**MINIMAL, "scenario": {"name": "missing", "never_empty": True}}
    changed, notes = config.apply_overrides(raw, ["scenario.name=cross"], options_of)
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


def test_another_algorithm_keeps_the_options_that_both_know() -> None:
    raw = {**MINIMAL, "algorithm": {"name": "fedprox", "mu": 0.5, "server_lr": 0.5}}
    changed, notes = config.apply_overrides(raw, ["algorithm.name=fedavg"], options_of)
    assert changed["algorithm"] == {"name": "fedavg", "server_lr": 0.5}
    assert len(notes) == 1
    assert algorithms.build("fedavg", config.validate(changed).algorithm.options)


def test_a_misspelt_option_is_kept_and_refused() -> None:
    raw = {**MINIMAL, "scenario": {"name": "hybrid", "presense": 0.6}}
    changed, notes = config.apply_overrides(raw, ["scenario.name=cross"], options_of)
    assert not notes
    with pytest.raises(ConfigError, match=r"scenario\.presense: unknown key for scenario 'cross'"):
        scenarios.build("cross", config.validate(changed).scenario.options)


@pytest.mark.parametrize("order", [1, -1])
def test_options_given_with_the_new_name_belong_to_it_in_either_order(order: int) -> None:
    overrides = ["scenario.name=cross", "scenario.image_clients=3", "scenario.presence=0.1"][::order]
    changed, notes = config.apply_overrides(HYBRID, overrides, options_of)
    # The option from the file is dropped; the one on the command line is a mistake and is kept, so that it is refused.
    assert changed["scenario"] == {"name": "cross", "image_clients": 3, "presence": 0.1}
    assert notes == ["scenario.presence = 0.6 is an option of 'hybrid' and was dropped"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scenario.name=crss", "--set scenario.name=crss: scenario.name: there is no scenario 'crss'; did you mean 'cross'?"),
        ("seed.deep=1", "--set seed.deep: seed is a value, not a table."),
    ],
)
def test_an_invalid_override_is_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.apply_overrides({**HYBRID, "seed": 0}, [override], options_of)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such experiment file"),
        (b"name = ", "not valid TOML"),
        (b"\xff\xfe\x00", "cannot be read as a text file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "exp.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"exp\.toml: {message}"):
        config.read(path)


def test_a_folder_or_a_path_through_a_file_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "exp.toml").write_text("")
    for path in (tmp_path, tmp_path / "exp.toml" / "deeper.toml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            config.read(path)


def test_the_schema_for_editors_can_be_made() -> None:
    assert "clients_per_round" in Experiment.model_json_schema()["$defs"]["TrainTable"]["properties"]


@pytest.mark.parametrize(
    "settings",
    [["partition.alpha=1"], ["partition.alpha=1.0"], ["partition.alpha=1.0", "algorithm.server_lr=1", "task.companion.seed=0"]],
)
def test_equal_experiments_have_equal_digests(settings: list[str]) -> None:
    raw = config.read(Path(__file__).parents[1] / "experiments" / "quickstart.toml")
    variant, _ = config.apply_overrides(raw, settings, options_of)
    plain, _ = config.apply_overrides(raw, ["partition.alpha=1.0"], options_of)
    assert with_defaults(config.validate(variant)).digest() == with_defaults(config.validate(plain)).digest()
    assert with_defaults(with_defaults(config.validate(variant))) == with_defaults(config.validate(variant))


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("partition", "iid"),
        ("scenario", "aligned"),
        ("prompt", "modality-agnostic"),
        ("algorithm", "fedavg"),
        ("fleet", "in-process"),
    ],
)
def test_a_table_without_a_name_is_the_default_part(table: str, name: str) -> None:
    raw = {"task": {"name": "easy-vqa"}, table: {}}
    assert config.validate(raw) == config.validate({"task": {"name": "easy-vqa"}, table: {"name": name}})


def test_options_without_a_name_are_those_of_the_default_part() -> None:
    parsed = with_defaults(
        config.validate({"task": {"name": "easy-vqa"}, "partition": {"clients": 4}, "algorithm": {"server_lr": 0.5}})
    )
    assert (parsed.partition.name, parsed.partition.clients) == ("iid", 4)
    assert (parsed.algorithm.name, parsed.algorithm.options["server_lr"]) == ("fedavg", 0.5)
    with pytest.raises(ConfigError, match=r"partition\.alpha: unknown key for partition 'iid'"):
        with_defaults(config.validate({"task": {"name": "easy-vqa"}, "partition": {"alpha": 1.0}}))
