"""Registries map names to factories. A part is added as one new file with one decorated function; nothing else is edited.

    tasks = Registry("task", package="fedmllm.data.tasks")

    @tasks.register("easy-vqa")
    def easy_vqa(*, split_seed: int = 0) -> Task:
        \"\"\"The first line is shown by `fedmllm list` and in the documentation.\"\"\"

Parts are found by importing the modules of the package in sorted order, then the entry points `fedmllm.<kind>s` of installed
packages, then the plug-in files of `load_plugin`. The options of a factory are keyword arguments; their names and types are
checked against its signature before it is called.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from fedmllm.errors import ConfigError, suggest

T = TypeVar("T")
Former = Mapping[str, tuple[str, Mapping[Any, Any]]]
"""Options of earlier versions that files may still set: old option -> (the option that replaced it, old value -> new value)."""

PLUGINS = "FEDMLLM_PLUGINS"
"""The environment variable that lists the plug-in files, so that child processes load them too."""
_PLUGIN_MODULE = "fedmllm_plugin_"


@cache
def installed_parts() -> Any:  # EntryPoints, which Python 3.11 wraps in a class that later versions lack
    """The entry points of all installed packages, read once because reading them takes tens of milliseconds."""
    return entry_points()


def plugin_files() -> list[Path]:
    return [Path(name) for name in os.environ.get(PLUGINS, "").split(os.pathsep) if name]


def load_plugin(path: Path) -> None:
    """Import a file that registers parts, once, here and in child processes. Raises ConfigError if that fails."""
    path = path.absolute()
    if not path.is_file():
        raise ConfigError(f"--plugin {path}: there is no such file.")
    name = f"{_PLUGIN_MODULE}{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--plugin {path}: this is not a Python file; give one that ends in .py.")
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a plug-in can raise anything
        del sys.modules[name]
        reason = " ".join(str(error).split())
        raise ConfigError(f"--plugin {path}: it cannot be imported ({type(error).__name__}: {reason}).") from None
    if path not in plugin_files():
        os.environ[PLUGINS] = os.pathsep.join(map(str, [*plugin_files(), path]))


def _origin(factory: Callable[..., object]) -> str:
    """The module of a factory, or the file of a plug-in."""
    module = factory.__module__
    return str(sys.modules[module].__file__) if module.startswith(_PLUGIN_MODULE) else module


class Registry(Generic[T]):
    """The parts of one kind, such as all tasks, by name."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.plural = re.sub(r"([^aeiou])y$", r"\1ie", kind) + "s"  # family → families, but toy → toys
        self._package = package
        self._factories: dict[str, Callable[..., T]] = {}
        self._former: dict[str, Former] = {}
        self._options: dict[str, type[BaseModel]] = {}

    def register(self, name: str, former: Former | None = None) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Decorate the factory of a part; `former` has its options of earlier versions. Raises ConfigError if the name is
        taken."""

        def decorate(factory: Callable[..., T]) -> Callable[..., T]:
            if name in self._factories:
                origins = f"{_origin(self._factories[name])} and {_origin(factory)}"
                raise ConfigError(f"{self.kind} {name!r} is registered twice, by {origins}; rename one of them.")
            self._factories[name] = factory
            if former:
                self._former[name] = former
            return factory

        return decorate

    @cached_property
    def _discovered(self) -> dict[str, Callable[..., T]]:
        package = importlib.import_module(self._package)
        for module in sorted(m.name for m in pkgutil.iter_modules(getattr(package, "__path__", []))):
            importlib.import_module(f"{self._package}.{module}")
        for point in sorted(installed_parts().select(group=f"fedmllm.{self.plural}"), key=lambda p: p.name):
            point.load()
        for path in plugin_files():
            load_plugin(path)
        return self._factories

    def names(self) -> list[str]:
        return sorted(self._discovered)

    def describe(self, name: str) -> str:
        """The first line of the factory's docstring."""
        return (inspect.getdoc(self.factory(name)) or "").partition("\n")[0]

    def factory(self, name: str, where: str | None = None) -> Callable[..., T]:
        """Raises ConfigError for an unknown name."""
        if name not in self._discovered:
            raise ConfigError(f"{where or self.kind}.name: there is no {self.kind} {name!r}; {suggest(name, self._discovered)}")
        return self._discovered[name]

    def option_names(self, name: str) -> list[str]:
        return sorted(self._model(name).model_fields)

    def former_options(self, name: str) -> list[str]:
        """The options of earlier versions that are still understood."""
        self.factory(name)
        return sorted(self._former.get(name, {}))

    def defaults(self, name: str) -> dict[str, Any]:
        """The options that are not required, with their defaults."""
        return {key: field.default for key, field in sorted(self._model(name).model_fields.items()) if not field.is_required()}

    def _model(self, name: str) -> type[BaseModel]:
        if name not in self._options:
            factory = self.factory(name)
            hints = get_type_hints(factory)
            fields: dict[str, Any] = {
                key: (hints.get(key, Any), ... if p.default is inspect.Parameter.empty else p.default)
                for key, p in inspect.signature(factory).parameters.items()
            }
            settings = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
            self._options[name] = create_model(f"{self.kind}:{name}", __config__=settings, **fields)
        return self._options[name]

    def check(self, name: str, options: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
        """All options of the part, including defaults. Raises ConfigError, naming the first invalid one as `where.option`."""
        where = where or self.kind
        self.factory(name, where)
        model, current = self._model(name), dict(options)
        for old, (new, values) in self._former.get(name, {}).items():
            if old not in current:
                continue
            value = current.pop(old)
            meant = [then for known, then in values.items() if type(known) is type(value) and known == value]
            if new in current or not meant:
                choices = " or ".join(f"{json.dumps(then)} for {json.dumps(known)}" for known, then in values.items())
                raise ConfigError(f"{where}.{old}: this option is now `{new}`; write {new} = {choices}.")
            current[new] = meant[0]
        try:
            checked = model.model_validate(current)
        except ValidationError as error:
            raise ConfigError(explain(error, where, lambda _: model.model_fields, f"{self.kind} {name!r}")) from None
        return {key: getattr(checked, key) for key in model.model_fields}

    def build(self, name: str, options: Mapping[str, Any], where: str | None = None) -> T:
        """Build the part. Raises ConfigError, naming the first invalid option as `where.option`."""
        where = where or self.kind
        checked = self.check(name, options, where)
        try:
            return self.factory(name)(**checked)
        except ConfigError:
            raise
        except ValueError as error:  # from the factory's own check of its options
            raise ConfigError(f"{where}: {error}") from None


def explain(
    error: ValidationError,
    where: str,
    known: Callable[[tuple[int | str, ...]], Mapping[str, Any]],
    owner: str = "",
) -> str:
    """The first problem of a pydantic error as one sentence with its dotted path; `known(path)` has the valid keys there."""
    # Unknown keys come first: if a required key is misspelt, it is also missing.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path = ".".join(part for part in (where, *(str(p) for p in first["loc"])) if part)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        hint = suggest(str(first["loc"][-1]), known(first["loc"][:-1]))
        return f"{path}: unknown key{f' for {owner}' if owner else ''}; {hint}{more}"
    if first["type"] == "missing":
        return f"{path}: this key is required{f' by {owner}' if owner else ''}.{more}"
    message = _WITHOUT_JARGON.get(first["type"]) or first["msg"][0].lower() + first["msg"][1:]
    if message == _LIST and isinstance(first["input"], str):
        texts = [text.strip(" \"'") for text in first["input"].strip("[]").split(",")]
        message += f", written as {json.dumps(texts, ensure_ascii=False)}"
    return f"{path}: {message.removeprefix('value error, ')}, got {first['input']!r}.{more}"


_LIST = "must be a list"
_WITHOUT_JARGON = {
    **dict.fromkeys(("tuple_type", "list_type"), _LIST),
    **dict.fromkeys(("dict_type", "model_type", "mapping_type"), "must be a table"),
    "too_short": "must not be empty",  # every list with a least length has 1
    "string_type": "must be text, which is written in quotes (with --set in two kinds: key='\"text\"')",
}
"""Messages for errors that pydantic words in terms of Python."""
