"""`fedmllm list`: what an experiment file can name."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from fedmllm.cli.output import Json, print_json, print_table


class PartKinds(StrEnum):
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
    robust = "robust"
    privacy = "privacy"
    attacks = "attacks"
    suites = "suites"
    asynchronous = "asynchronous"
    devices = "devices"


def list_parts(kind: PartKinds, as_json: Json = False) -> None:
    """List what an experiment file can name."""
    from rich.table import Table
    from rich.text import Text

    parts = parts_of(kind)
    if as_json:
        print_json(parts)
        return
    table = Table(show_header=False, box=None)
    for part in parts:
        lines = [Text(part["description"])]
        if part["options"]:
            defaults = part.get("defaults", {})
            options = ", ".join(f"{o} = {defaults[o]!r}" if o in defaults else o for o in part["options"])
            lines.append(Text(f"options: {options}", "dim"))
        if "down" in part:
            lines.append(Text(f"travels down: {', '.join(part['down'])}; up: {', '.join(part['up'])}", "dim"))
        table.add_row(Text(part["name"], "bold"), Text("\n").join(lines))
    print_table(table)


def parts_of(kind: PartKinds) -> list[dict[str, Any]]:
    """One row per part: its name, the first line of its docstring, its options and their defaults; for algorithms also the
    groups of tensors that travel."""
    from fedmllm.algorithms.traffic import traffic_of
    from fedmllm.evaluation.suites import suites
    from fedmllm.experiment.parts import REGISTRIES
    from fedmllm.models.families import families
    from fedmllm.models.shipped import SHIPPED
    from fedmllm.simulation.devices import devices

    rows: list[dict[str, Any]]
    if kind is PartKinds.models:
        rows = [{"name": name, "description": model.description, "options": []} for name, model in SHIPPED.items()]
        for name in families.names():
            rows.append({"name": name, "description": f"Hugging Face ids and folders of model type {name}.", "options": []})
        return rows
    registry = next(r for r in (*REGISTRIES.values(), suites, devices) if kind.value in (r.kind, f"{r.kind}s"))
    rows = [
        {
            "name": name,
            "description": registry.describe(name),
            "options": registry.option_names(name),
            "defaults": registry.defaults(name),
        }
        for name in registry.names()
    ]
    if kind is PartKinds.algorithms:
        rows = [row | traffic_of(registry.build(str(row["name"]), {})) for row in rows]
    return rows
