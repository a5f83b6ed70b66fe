from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import call
from fedmllm import config
from fedmllm.config import Experiment
from fedmllm.errors import ConfigError
from fedmllm.experiment.parts import build, options_of, with_defaults
from helpers import apply_overrides, quick
from made_runs import replicated

SHIPPED = sorted((Path(__file__).parents[1] / "experiments").rglob("*.toml"))
SHIPPED = [path for path in SHIPPED if not path.name.endswith((".sweep.toml", "hypotheses.toml"))]
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
        ({"task": {"name": "easy-vqa", "balanced": True}},
         "task.balanced = true changes nothing if all samples are used; set task.train_samples or task.test_samples, or leave "
         "it out."),
        ({"task": {"name": "easy-vqa", "companion": {"name": "shapes-qa", "balanced": True}}},
         "task.companion.balanced = true changes nothing if all samples are used; set task.companion.train_samples or "
         "task.companion.test_samples, or leave it out."),
        ({**MINIMAL, "train": 3}, "train: must be a table, got 3."),
        ({**MINIMAL, "name": 5},
         "name: must be text, which is written in quotes (with --set in two kinds: key='\"text\"'), got 5."),
        ({**MINIMAL, "eval": {"patterns": []}}, "eval.patterns: must not be empty, got []."),
        ({**MINIMAL, "eval": {"patterns": "both"}}, 'eval.patterns: must be a list, written as ["both"], got \'both\'.'),
        ({**MINIMAL, "eval": {"patterns": "[both, text]"}},
         'eval.patterns: must be a list, written as ["both", "text"], got \'[both, text]\'.'),
        ({**MINIMAL, "clients": {"rank": 8}}, "clients.rank: must be a list, got 8."),
        ({**MINIMAL, "eval": {"patterns": ["both", "text", "both"]}},
         "eval.patterns: must name each pattern once, got ['both', 'text', 'both']."),
    ],
)  # fmt: skip
def test_bad_settings_are_one_sentence(raw: dict[str, Any], message: str) -> None:
    assert refusal(raw) == message
    assert refusal(raw, "exp.toml") == f"exp.toml: {message}"


@pytest.mark.parametrize(
    "name",
    ["", " ", "a/b", "a\\b", "..", ".hidden", "a\nb", "a\x1b[0m", " a", "a ", "x" * 300, "é" * 101, "字" * 67, "\ud800"],
)
def test_a_name_must_be_usable_as_a_folders_name(name: str) -> None:
    assert refusal({**MINIMAL, "name": name}).startswith("name: must ")


@pytest.mark.parametrize("name", ["x" * 200, "é" * 100, "α = 0.5", "a.b-c_d", "nan"])
def test_other_names_are_accepted(name: str) -> None:
    assert config.validate({**MINIMAL, "name": name}).name == name


@pytest.mark.parametrize(
    ("key", "largest", "too_large"),
    [
        ("train.lr", 100, [100.5, 1e308]),
        ("train.epochs", 1000, [1001, 10**9]),
        ("train.rounds", 10**6, [10**6 + 1, 10**9]),
        ("train.weight_decay", 100, [101, 1e300]),
        ("train.clip", 10**6, [1e7, 1e308]),
        ("train.batch_size", 65_536, [65_537, 10**12]),
        ("train.accumulate", 65_536, [10**9]),
        ("train.cohort", 65_536, [10**9]),
        ("train.max_length", 10**6, [10**9]),
        ("eval.every", 10**6, [10**9]),
        ("eval.batch_size", 65_536, [10**9]),
        ("eval.bootstrap", 100_000, [10**9]),
        ("eval.max_new_tokens", 32_768, [10**9]),
        ("partition.clients", 10**6, [2 * 10**9]),
        ("model.lora.rank", 8192, [10**9]),
        ("model.lora.alpha", 65_536, [1e308]),
        ("model.adapter.virtual_tokens", 4096, [10**9]),
        ("seed", 2**63 - 1, [2**63, 10**400]),
    ],
)
def test_numbers_have_bounds_with_a_reason(key: str, largest: int, too_large: list[float]) -> None:
    accepted, _ = config.apply_settings(MINIMAL, [(key.split("."), largest)], options_of)
    assert config.validate(accepted)
    for number in too_large:
        raw, _ = config.apply_settings(MINIMAL, [(key.split("."), number)], options_of)
        message = refusal(raw)
        # A key with a choice of types is followed by the type.
        assert re.match(rf"{re.escape(key)}(\.int|\..*)?: must be at most {largest}, \w+", message), message


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ("partition", {"name": "dirichlet", "alpha": 1e308}, "partition: alpha = 1e+308 must be above 0 and at most 1000000"),
        ("partition", {"name": "dirichlet", "alpha": 0.0}, "partition: alpha = 0.0 must be above 0"),
        ("task", {"name": "pocket-memes", "n": 10**9}, "task: n = 1000000000 must be at most 1000000"),
        ("task", {"name": "shapes-qa", "test": 10**9}, "task: test = 1000000000 must be at most 1000000"),
        ("fleet", {"name": "ray", "timeout": 1e308}, "fleet: timeout: must be greater than 0 and at most 10000000 seconds"),
        ("fleet", {"name": "flower", "absent": 1e300}, "fleet: wait, timeout and absent: must be greater than 0 and at most"),
    ],
)
def test_options_of_parts_have_bounds_too(table: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(config.validate({**MINIMAL, table: settings}))
    assert str(refused.value).startswith(message)


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
    ("content", "message"),
    [
        (None, "there is no such experiment file"),
        (b"name = ", "not valid TOML"),
        (b"seed = " + 5000 * b"1", "a number has more than 4,300 digits; write a shorter one"),
        (b"\xff\xfe\x00", "cannot be read as a text file .* save it as UTF-8"),
        (rb'data = "C:\Users\me"', r"not valid TOML: .*; write paths with / or in 'single quotes'"),
        (rb'data = "C:\xyz"', r"not valid TOML: .*; write paths with / or in 'single quotes'"),
        (rb'[task]' b"\n" rb'train = "data\new\train.jsonl"',
         r"task\.train: 'data\\new\\train\.jsonl' contains the control character '\\n'; write paths with / or in 'single"),
        (rb'task.companion.train = "my data\test.jsonl"', r"task\.companion\.train: .* control character '\\t'"),
        (rb'eval.transfer = [{ name = "a\u001b[2J" }]', r"eval\.transfer\.0\.name: .* control character '\\x1b'"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "exp.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"exp\.toml: {message}"):
        config.read(path)


SITE, SERVER = 'name = "a"\nsuperlink = "h:1"\n[task]\nname = "qa"', 'experiment = "e.toml"\ncertificate = "c.pem"'


@pytest.mark.parametrize(
    ("arguments", "content", "what"),
    [
        (["run"], 'base = "e.toml"', "a sweep, where an experiment is needed; `fedmllm sweep` runs it"),
        (["check"], "hypotheses = []", "a file of hypotheses, where an experiment is needed; `fedmllm report --hypotheses`"),
        (["run"], SITE, "a site's file, where an experiment is needed; `fedmllm client` reads it"),
        (["sweep"], '[task]\nname = "qa"', "an experiment, where a sweep is needed; `fedmllm run` runs it"),
        (["client"], SERVER, "a server's file, where a site's file is needed; `fedmllm server` reads it"),
        (["server"], SITE, "a site's file, where a server's file is needed; `fedmllm client` reads it"),
        (["report", "grid", "--out", "page.md", "--hypotheses"], 'base = "e.toml"', "a sweep, where a file of hypotheses"),
    ],
)
def test_a_file_of_another_kind_is_told_from_a_misspelt_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], content: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    replicated(Path("grid"), lambda *_: 0.5, replicates=1)
    Path("file.toml").write_text(content)
    done = call(*arguments, "file.toml")
    assert done.exit_code == 2
    assert f"error: file.toml: this is {what}" in done.stderr
    assert not Path("runs").exists()


def test_a_file_may_begin_with_a_byte_order_mark_and_have_questions_of_two_lines(tmp_path: Path) -> None:
    path = tmp_path / "exp.toml"
    path.write_bytes(b'\xef\xbb\xbfname = "marked"\n[task]\nname = "hub"\nask = "Look.\\nIs it red?"\ntrain = \'data\\new\'\n')
    task = {"name": "hub", "ask": "Look.\nIs it red?", "train": "data\\new"}
    assert config.read(path) == {"name": "marked", "task": task}


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
    variant, _ = apply_overrides(raw, settings)
    plain, _ = apply_overrides(raw, ["partition.alpha=1.0"])
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
