"""Reading an experiment file: TOML, `--set key=value` overrides, and validation with one-sentence errors."""

from __future__ import annotations

import json
import re
import tomllib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fedmllm.config.schema import Experiment, default_names
from fedmllm.errors import ConfigError
from fedmllm.registry import explain

Setting = tuple[list[str], Any]
"""(path of a key, value), such as (["train", "rounds"], 5)."""
_MAX_DEPTH = 50
_TOO_DEEP = f"tables or lists are more than {_MAX_DEPTH} deep; no setting is."
_PATHS = "write paths with / or in 'single quotes'"


def parse_override(text: str) -> Setting:
    """Parse `train.rounds=5` into (["train", "rounds"], 5). The value is read as TOML, or as a string if it is not TOML.

    Raises ConfigError if there is no equals sign, a part of the key is empty, or the value has a control character.
    """
    key, equals, text_of_value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise ConfigError(f"--set {text}: write it as key=value, for example --set train.rounds=5.")
    try:
        value = tomllib.loads(f"value = {text_of_value}")["value"]
    except (ValueError, RecursionError):  # a ValueError that is no TOMLDecodeError: a number of more than 4,300 digits
        value = text_of_value.strip()
    _check_text(value, f"--set {'.'.join(path)}")
    return path, value


def _check_text(value: Any, where: str) -> None:
    """Raises ConfigError for a string with a control character: TOML reads the backslashes of "data\\new.jsonl" as escapes;
    and for values deeper than any setting, which later steps could not follow.

    A line feed is accepted in text with spaces, such as the wording of a question.
    """
    if where.count(".") > _MAX_DEPTH:
        raise ConfigError(f"{where}: {_TOO_DEEP}")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_text(inner, f"{where}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            _check_text(entry, f"{where}.{number}")
    elif isinstance(value, str):
        control = next((c for c in value if unicodedata.category(c) == "Cc" and not (c == "\n" and " " in value)), None)
        if control is not None:
            raise ConfigError(f"{where}: {value!r} contains the control character {control!r}; {_PATHS}.")


def flattened(settings: Iterable[Setting]) -> list[Setting]:
    """The settings with a table as value replaced by one setting per key, so that they change a table and do not replace it.

    A part inside another, such as `task.companion = { name = "shapes-qa" }`, stays a whole.
    """

    def split(path: list[str], value: Any) -> Iterator[Setting]:
        if isinstance(value, Mapping) and not (len(path) > 1 and "name" in value):
            for key, inner in value.items():
                yield from split([*path, *key.split(".")], inner)
        else:
            yield path, value

    return [setting for path, value in settings for setting in split(path, value)]


@contextmanager
def blaming(where: str, settings: Sequence[Setting] = ()) -> Iterator[None]:
    """Begin the message of a ConfigError with `where`, or with "--set" if it is about a key that one of the settings gave."""
    try:
        yield
    except ConfigError as error:
        message = str(error)
        if any(_is_about(message, ".".join(path)) for path, _ in flattened(settings)):
            raise ConfigError(message if message.startswith("--set ") else f"--set {message}") from None
        raise ConfigError(f"{where}: {message}" if where else message) from None


def _is_about(message: str, key: str) -> bool:
    """Whether the message begins with the key, a table around it or an entry of it, or states its value as "key = value"."""
    subject = re.split(r":| = ", message.removeprefix("--set "), maxsplit=1)[0]
    return (
        f"{key}.".startswith(f"{subject}.")
        or f"{subject}.".startswith(f"{key}.")
        or re.search(rf"(?<![\w.]){re.escape(key)} = ", message) is not None
    )


OptionNames = Callable[[str, str], Sequence[str]]
"""(table, name of a part) -> the options of that part; raises ConfigError for an unknown part."""


def apply_settings(
    raw: dict[str, Any], settings: Sequence[Setting], options_of: OptionNames, prefix: str = "--set "
) -> tuple[dict[str, Any], list[str]]:
    """(a copy of `raw` with the settings applied, a note for each option that was dropped). Messages begin with `prefix`.

    A setting that changes the name of a part drops the options that only the old part has: `--set scenario.name=cross` on a
    file with the scenario hybrid drops `presence`. Another task keeps neither options, because options of one name are about
    other data, nor the companion, which may have another metric. Misspelt options are kept, so that validation reports them.
    Raises ConfigError for an unknown part or a path through a value.
    """
    result = json.loads(json.dumps(raw, default=str))
    notes: list[str] = []
    # Names first, outer ones before inner ones, so that an option in the same command belongs to the new part, whatever their
    # order.
    for path, value in sorted(flattened(settings), key=lambda pv: (pv[0][-1] != "name", len(pv[0]))):
        table = result
        for depth, part in enumerate(path[:-1], start=1):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{prefix}{'.'.join(path)}: {'.'.join(path[:depth])} is a value, not a table.")
        part = "task" if path == ["task", "companion", "name"] else path[0] if len(path) == 2 and path[1] == "name" else ""
        old = table.get("name", default_names().get(part))
        if part and isinstance(old, str) and isinstance(value, str) and old != value:
            try:
                obsolete, kept = set(options_of(part, old)), set(options_of(part, value))
            except ConfigError as error:
                raise ConfigError(f"{prefix}{'.'.join(path)}={value}: {error}" if prefix else str(error)) from None
            for option in sorted((obsolete if part == "task" else obsolete - kept) & table.keys()):
                key = ".".join([*path[:-1], option])
                notes.append(f"{key} = {table.pop(option)!r} is an option of {old!r} and was dropped")
            if part == "task" and table.pop("companion", None):
                notes.append(f"{'.'.join(path[:-1])}.companion is the companion of {old!r} and was dropped")
        table[path[-1]] = value
    return result, notes


FileKind = Literal["experiment", "sweep", "hypotheses", "site", "federation"]
_KINDS: Mapping[FileKind, tuple[str, str, str]] = {
    "sweep": ("base", "a sweep", "`fedmllm sweep` runs it"),
    "hypotheses": ("hypotheses", "a file of hypotheses", "`fedmllm report --hypotheses` reads it"),
    "site": ("superlink", "a site's file", "`fedmllm client` reads it"),
    "federation": ("certificate", "a server's file", "`fedmllm server` reads it"),
    "experiment": ("task", "an experiment", "`fedmllm run` runs it"),
}
"""A key that a file of this kind has at its top, and one of the kinds below it has not; what it is; what it is for."""


def read(path: Path, kind: FileKind = "experiment") -> dict[str, Any]:
    """The raw tables of a TOML file. Raises ConfigError if the file does not exist, is not valid TOML, has a string with a
    control character, or is of another kind."""
    raw = _tables(path, kind)
    found = next((other for other, (key, _, _) in _KINDS.items() if key in raw), kind)
    if found != kind:
        _, what, use = _KINDS[found]
        raise ConfigError(f"{path}: this is {what}, where {_KINDS[kind][1]} is needed; {use}.")
    with blaming(str(path)):
        _check_text(raw, "")
    return raw


def _tables(path: Path, kind: FileKind) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such {kind} file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read as a text file ({error}); save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a text file ({error}).") from None
    except RecursionError:
        raise ConfigError(f"{path}: {_TOO_DEEP}") from None
    except tomllib.TOMLDecodeError as error:
        escape = any(word in str(error) for word in ("Unescaped", "Invalid hex", "Escaped"))
        raise ConfigError(f"{path}: not valid TOML: {error}{f'; {_PATHS}' if escape else ''}.") from None
    except ValueError:  # Python's limit
        raise ConfigError(f"{path}: a number has more than 4,300 digits; write a shorter one.") from None


def validate(raw: Mapping[str, Any], where: str = "") -> Experiment:
    """The experiment as frozen models. Raises ConfigError for the first invalid key, with its path and `where`."""
    try:
        return Experiment.model_validate(dict(raw))
    except ValidationError as error:
        message = explain(error, "", keys_at)
        if error.errors()[0]["type"] == "value_error" and not error.errors()[0]["loc"]:
            message = str(error.errors()[0]["ctx"]["error"])  # a check of several keys, which is a complete sentence
        raise ConfigError(f"{where}: {message}" if where else message) from None


def _inner_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is not None:
        return [model for part in get_args(annotation) for model in _inner_models(part)]
    return []


def keys_at(path: tuple[int | str, ...], model: type[BaseModel] = Experiment) -> Mapping[str, Any]:
    """The fields of the table at `path` of a file whose outermost table is `model`; a number in it is a place in a list."""
    for part in (part for part in path if isinstance(part, str)):
        field = model.model_fields.get(part)
        inner = _inner_models(field.annotation) if field else []
        if not inner:
            return {}
        model = inner[0]
    return {field.alias or name: field for name, field in model.model_fields.items()}
