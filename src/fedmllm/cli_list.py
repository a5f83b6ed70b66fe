"""`fedmllm list`: what an experiment file can name."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

from fedmllm.printing import Json, print_json, print_table

if TYPE_CHECKING:
    from fedmllm.registry import Registry


class Kinds(StrEnum):
    tasks = "tasks"
    scenarios = "scenarios"
    partitions = "partitions"
    algorithms = "algorithms"
    regularizations = "regularizations"
    compressions = "compressions"
    prompts = "prompts"
    models = "models"
    judges = "judges"
    fleets = "fleets"
    secure = "secure"


def list_parts(kind: Kinds, as_json: Json = False) -> None:
    """List what an experiment file can name."""
    from rich.markup import escape
    from rich.table import Table

    found = _parts(kind)
    if as_json:
        print_json(found)
        return
    table = Table(show_header=False, box=None)
    for part in found:
        lines = [escape(part["description"])]
        if part["options"]:
            defaults = part.get("defaults", {})
            shown = ", ".join(f"{o} = {defaults[o]!r}" if o in defaults else o for o in part["options"])
            lines.append(f"[dim]options: {escape(shown)}[/dim]")
        if "down" in part:
            lines.append(f"[dim]travels down: {', '.join(part['down'])}; up: {', '.join(part['up'])}[/dim]")
        table.add_row(f"[bold]{escape(part['name'])}[/bold]", "\n".join(lines))
    print_table(table)


def _parts(kind: Kinds) -> list[dict[str, Any]]:
    from fedmllm.algorithms import algorithms
    from fedmllm.algorithms.travel import travels
    from fedmllm.models.families import families

    if kind is Kinds.models:
        pocket = {"name": "pocket", "description": "The small model that ships with the package.", "options": []}
        known = [
            {"name": name, "description": f"Hugging Face ids and folders of model type {name}.", "options": []}
            for name in families.names()
        ]
        return [pocket, *known]
    registry = _registry(kind)
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "description": registry.describe(name),
            "options": registry.option_names(name),
            "defaults": registry.defaults(name),
        }
        for name in registry.names()
    ]
    if kind is Kinds.algorithms:
        for part in found:
            part |= travels(algorithms.build(part["name"], {}))
    return found


def _registry(kind: Kinds) -> Registry[Any]:
    from fedmllm.algorithms import algorithms, compressions, regularizations
    from fedmllm.data.partition import partitions
    from fedmllm.data.prompts import prompts
    from fedmllm.data.scenarios import scenarios
    from fedmllm.data.tasks import tasks
    from fedmllm.evaluation.judging import judges
    from fedmllm.fleets import fleets
    from fedmllm.secure.settings import secures

    registries: tuple[Registry[Any], ...] = (
        tasks, scenarios, partitions, algorithms, regularizations, compressions, prompts, judges, fleets, secures
    )  # fmt: skip
    return next(registry for registry in registries if registry.kind in (kind.value, kind.value.removesuffix("s")))
