"""Reading an experiment file: TOML, `--set key=value` overrides, and validation with one-sentence errors."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fedmllm.config.schema import Experiment
from fedmllm.errors import ConfigError
from fedmllm.registry import explain

Setting = tuple[list[str], Any]
"""(path of a key, value), such as (["train", "rounds"], 5)."""


def parse_override(text: str) -> Setting:
    """Parse `train.rounds=5` into (["train", "rounds"], 5). The value is read as TOML, or as a string if it is not TOML.

    Raises ConfigError if there is no equals sign or a part of the key is empty.
    """
    key, equals, value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise ConfigError(f"--set {text}: write it as key=value, for example --set train.rounds=5.")
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path, value.strip()


OptionNames = Callable[[str, str], Sequence[str]]
"""(table, name of a part) -> the options of that part; raises ConfigError for an unknown part."""


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str], options_of: OptionNames) -> tuple[dict[str, Any], list[str]]:
    """Apply overrides given as text, as `apply_settings` does."""
    return apply_settings(raw, [parse_override(override) for override in overrides], options_of)


def apply_settings(
    raw: dict[str, Any], settings: Sequence[Setting], options_of: OptionNames
) -> tuple[dict[str, Any], list[str]]:
    """(a copy of `raw` with the settings applied, a note for each option that was dropped).

    A setting that changes the name of a part drops the options that only the old part has: `--set scenario.name=cross` on a
    file with the scenario hybrid drops `presence`. Misspelt options are kept, so that validation reports them. Raises
    ConfigError for an unknown part or a path through a value.
    """
    result = json.loads(json.dumps(raw, default=str))
    notes: list[str] = []
    # Names first, so that an option in the same command belongs to the new part, whatever the order of the two.
    for path, value in sorted(settings, key=lambda pv: pv[0][-1] != "name"):
        table = result
        for depth, part in enumerate(path[:-1], start=1):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {'.'.join(path)}: {'.'.join(path[:depth])} is a value, not a table.")
        old = table.get("name")
        if len(path) == 2 and path[-1] == "name" and isinstance(old, str) and isinstance(value, str) and old != value:
            try:
                obsolete = set(options_of(path[0], old)) - set(options_of(path[0], value))
            except ConfigError as error:
                raise ConfigError(f"--set {'.'.join(path)}={value}: {error}") from None
            for option in sorted(obsolete & table.keys()):
                notes.append(f"{path[0]}.{option} = {table.pop(option)!r} is an option of {old!r} and was dropped")
        table[path[-1]] = value
    return result, notes


def read(path: Path) -> dict[str, Any]:
    """The raw tables of a TOML file. Raises ConfigError if the file does not exist or is not valid TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such experiment file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file ({error}).") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from None


def validate(raw: Mapping[str, Any], where: str = "") -> Experiment:
    """The experiment as frozen models. Raises ConfigError for the first invalid key, with its path and `where`."""
    try:
        return Experiment.model_validate(dict(raw))
    except ValidationError as error:
        message = explain(error, "", _keys_at)
        if error.errors()[0]["type"] == "value_error" and not error.errors()[0]["loc"]:
            message = str(error.errors()[0]["ctx"]["error"])  # a check of several keys, which is a complete sentence
        raise ConfigError(f"{where}: {message}" if where else message) from None


def _inner_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is not None:
        return [model for part in get_args(annotation) for model in _inner_models(part)]
    return []


def _keys_at(path: tuple[int | str, ...]) -> Mapping[str, Any]:
    model: type[BaseModel] = Experiment
    for part in path:
        field = model.model_fields.get(str(part))
        inner = _inner_models(field.annotation) if field else []
        if not inner:
            return {}
        model = inner[0]
    return model.model_fields
