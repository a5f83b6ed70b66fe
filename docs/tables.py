"""Generate the tables of the documentation: parts from the registries, keys from the models of the experiment file, commands.

    make tables        # the same as `python docs/tables.py`; `make docs` runs it first

In each page of this folder, the text between `<!-- table: NAME -->` and `<!-- end -->` is replaced by the table NAME: one of
`parts`, `models`, the names of the registries, such as `tasks` and `algorithms`, `keys.` with a table of the experiment file,
such as `keys.train`, and `commands`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parent
PAGES = {
    "tasks": "data.md",
    "partitions": "experiments.md",
    "scenarios": "scenarios.md",
    "prompts": "experiments.md",
    "models": "models.md",
    "algorithms": "algorithms.md",
    "regularizations": "algorithms.md",
    "compressions": "algorithms.md",
    "secure": "experiments.md",
    "robust": "attacks.md",
    "privacy": "experiments.md",
    "attacks": "attacks.md",
    "asynchronous": "devices.md",
    "judges": "scoring.md",
    "fleets": "fleets.md",
    "suites": "suites.md",
}
"""table of parts -> the page that describes these parts."""
_BLOCK = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)
_PROPERTIES = {
    "averages": "averages",
    "unequal_ranks": "unequal ranks",
    "personal": "personal",
    "needs_lora": "needs LoRA",
    "needs_core": "needs LoRA-XS",
    "refactors": "new factors",
}
"""Field of `Algorithm` -> the name of the property in the table."""


class Sources(NamedTuple):
    """What the tables are generated from: every registry by its table's name, the model families, and the tensors that travel
    under an algorithm as {"down": groups, "up": groups}, the JSON schema of the experiment file, the part that a table without
    a name chooses, and the click command."""

    registries: Mapping[str, Any]
    families: Any
    traffic_of: Callable[[Any], Mapping[str, Sequence[str]]]
    schema: Mapping[str, Any]
    default_names: Mapping[str, str]
    command: Any


def load_sources() -> Sources:
    """The only place that imports fedmllm."""
    import typer.main

    from fedmllm.algorithms.traffic import traffic_of
    from fedmllm.cli.app import app
    from fedmllm.config import Experiment
    from fedmllm.config.schema import default_names
    from fedmllm.evaluation.suites import suites
    from fedmllm.experiment.parts import REGISTRIES
    from fedmllm.models.families import families

    unchanged = ("secure", "robust", "privacy", "asynchronous")
    registries = {kind if kind in unchanged else f"{kind}s": registry for kind, registry in REGISTRIES.items()}
    schema, command = Experiment.model_json_schema(), typer.main.get_command(app)
    return Sources(registries | {"suites": suites}, families, traffic_of, schema, default_names(), command)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. An empty cell is a dash."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') or '–' for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _options(registry: Any, name: str) -> str:
    """ "`data_dir` (required), `language = "en"`, `positive`": the last is unset by default."""
    defaults = registry.defaults(name)

    def shown(option: str) -> str:
        if option not in defaults:
            return f"`{option}` (required)"
        value = defaults[option]
        return f"`{option}`" if value is None else f"`{option} = {json.dumps(value, ensure_ascii=False)}`"

    required_first = sorted(registry.option_names(name), key=lambda option: (option in defaults, option))
    return ", ".join(map(shown, required_first))


def _row(registry: Any, name: str) -> list[str]:
    return [f"`{name}`", registry.describe(name).removesuffix("."), _options(registry, name)]


def _parts(sources: Sources) -> str:
    """The inventory: every table of the experiment file that names a part, with the names."""
    from fedmllm.models.shipped import SHIPPED

    rows = []
    for kind, page in PAGES.items():
        if kind == "models":
            shipped = ", ".join(f"`{name}`" for name in SHIPPED)
            names = f"{shipped}, or a Hugging Face id or folder of any image-text-to-text model"
            rows.append(["`model`", names, f"[{page}]({page})"])
        else:
            registry = sources.registries[kind]
            names = [f"`{name}`" for name in registry.names()]
            rows.append([f"`{registry.kind}`", ", ".join(names), f"[{page}]({page})"])
    return table(["table", "names", "described in"], rows)


def _models(sources: Sources) -> str:
    def row(name: str) -> list[str]:
        family = sources.families.build(name, {})
        first = family.first_position
        positions = "the model's own" if first is None else f"counted by fedmllm, from {first}"
        shown = "one" if family.one_picture else "several"
        return [*_row(sources.families, name)[:2], shown, "yes" if family.cache else "no", positions]

    return table(
        ["model type", "description", "pictures in a prompt", "features cached", "position ids"],
        map(row, sources.families.names()),
    )


def _algorithms(sources: Sources) -> str:
    registry = sources.registries["algorithms"]

    def row(name: str) -> list[str]:
        algorithm = registry.build(name, {})
        traffic = sources.traffic_of(algorithm)
        properties = [shown for field, shown in _PROPERTIES.items() if getattr(algorithm, field)]
        return [*_row(registry, name), *(", ".join(traffic[way]) for way in ("down", "up")), ", ".join(properties)]

    return table(["name", "description", "options", "down", "up", "properties"], map(row, registry.names()))


def _type(schema: Mapping[str, Any]) -> str:
    """ "integer ≥ 1": what a JSON schema allows, as one writes it in TOML."""
    if "anyOf" in schema:
        return " or ".join(_type(choice) for choice in schema["anyOf"] if choice.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}".replace("of table", "of tables")
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)
    return f"{schema.get('type', 'table')} {bounds}".strip()


def _keys(table_name: str, sources: Sources) -> str:
    """The keys of a table of the experiment file; "top" are those outside the tables. Keys of tables within have their path."""
    tables = sources.schema["$defs"]

    def properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
        return tables[schema["$ref"].rpartition("/")[2]]["properties"] if "$ref" in schema else {}

    def rows(prefix: str, keys: Mapping[str, Any]) -> Iterable[list[str]]:
        for key, schema in keys.items():
            if inner := properties(schema):
                yield from rows(f"{prefix}{key}.", inner)
                continue
            default = schema.get("default")
            if key == "name" and prefix == "" and table_name in {"task", *sources.default_names}:
                default = sources.default_names.get(table_name, "required")
            shown = "–" if default in (None, []) else default if default == "required" else f"`{json.dumps(default)}`"
            yield [f"`{prefix}{key}`", _type(schema), shown, " ".join(schema["description"].split()).removesuffix(".")]

    top = sources.schema["properties"]
    keys = (
        {key: schema for key, schema in top.items() if "$ref" not in schema}
        if table_name == "top"
        else properties(top[table_name])
    )
    return table(["key", "type", "default", "meaning"], rows("", keys))


def _command(name: str, command: Any) -> str:
    """A chapter on one command, or one on each of a group's."""
    if hasattr(command, "commands"):
        return "\n\n".join(_command(f"{name} {word}", inner) for word, inner in command.commands.items())

    def kind(parameter: Any) -> str:
        choices = getattr(parameter.type, "choices", None)
        return " | ".join(choices) if choices else parameter.metavar or parameter.type.name.upper()

    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join(
        [name, *(f"{argument.name.upper()}{'...' if argument.nargs < 0 else ''}" for argument in arguments), "[OPTIONS]"]
    )
    rows = [
        [f"`{argument.name.upper()}`", kind(argument), "required" if argument.required else "", argument.help or ""]
        for argument in arguments
    ]
    for option in options:
        value = "" if getattr(option, "is_flag", False) else kind(option)
        default = option.default
        shown = "required" if option.required else "" if default in (None, False) else f"`{getattr(default, 'value', default)}`"
        words = ", ".join(f"`{word}`" for word in (*option.opts, *option.secondary_opts))
        rows.append([words, value, shown, option.help or ""])
    lines = [f"## {name}", " ".join(command.help.split()), f"```text\n{usage}\n```"]
    return "\n\n".join([*lines, table(["argument or option", "value", "default", "meaning"], rows)])


def generate(name: str, sources: Sources) -> str:
    """The table called `name`. Raises ValueError if there is none."""
    special = {"parts": _parts, "models": _models, "algorithms": _algorithms}
    if name in special:
        return special[name](sources)
    if name == "commands":
        return _command("fedmllm", sources.command)
    if name.startswith("keys."):
        return _keys(name.removeprefix("keys."), sources)
    if name not in sources.registries:
        raise ValueError(f"there is no table {name!r}; choose one of {', '.join(sorted({*special, *sources.registries}))}")
    registry = sources.registries[name]
    return table(["name", "description", "options"], (_row(registry, part) for part in registry.names()))


def refreshed(page: Path, sources: Sources) -> str:
    """The page's text with its tables generated anew. Raises ValueError if a marker names no table or is not closed."""
    text = page.read_text(encoding="utf-8")
    if text.count("\n<!-- table: ") != len(_BLOCK.findall(text)):
        raise ValueError(f"{page.name}: close each <!-- table: NAME --> with <!-- end -->")
    return _BLOCK.sub(lambda block: f"<!-- table: {block[1]} -->\n\n{generate(block[1], sources)}\n\n<!-- end -->", text)


def pages() -> list[Path]:
    return sorted(DOCS.glob("*.md"))


def main() -> None:
    sources = load_sources()
    for page in pages():
        before, after = page.read_text(encoding="utf-8"), refreshed(page, sources)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.name}: tables refreshed")


if __name__ == "__main__":
    main()
